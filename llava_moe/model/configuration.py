"""The configuration of our model class: the stock LLaVA one plus a projector name and a `moe` section."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig

from llava_moe.registry import near_misses


@dataclasses.dataclass(frozen=True)
class NamedArgs:
    """A registry name and the options for it."""

    name: str
    args: dict[str, Any] = dataclasses.field(default_factory=dict)

    @staticmethod
    def from_dict(raw: Any, where: str) -> NamedArgs:
        """Parses `{"name": ..., "args": {...}}`.

        Raises:
            ValueError: it has another form.
        """
        if not isinstance(raw, dict) or "name" not in raw or not set(raw) <= {"name", "args"}:
            raise ValueError(f'config.json: {where} must be {{"name": ..., "args": {{...}}}}; got {raw!r}')
        return NamedArgs(raw["name"], dict(raw.get("args") or {}))


@dataclasses.dataclass(frozen=True)
class MoeSection:
    """Where the experts sit and what they are; travels in config.json so that `from_pretrained` rebuilds the modules.

    Attributes:
        layers: decoder layers whose feed-forward block is replaced, ascending.
        num_experts: E.
        router: a name of `llava_moe.moe.ROUTERS` with its options.
        experts: a name of `llava_moe.moe.EXPERTS` with its options.
    """

    layers: tuple[int, ...]
    num_experts: int
    router: NamedArgs = NamedArgs("top_k")
    experts: NamedArgs = NamedArgs("stacked")

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> MoeSection:
        """Parses the section of a config.json.

        Raises:
            ValueError: a key is unknown or missing, or a value makes no sense.
        """
        known = [field.name for field in dataclasses.fields(MoeSection)]
        for key in raw:
            if key not in known:
                raise ValueError(f"config.json: moe has no key {key!r}; {near_misses(key, known)}")
        for key in ("layers", "num_experts"):
            if key not in raw:
                raise ValueError(f"config.json: moe.{key} is missing")
        layers = tuple(sorted(int(i) for i in raw["layers"]))
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"config.json: moe.layers must name at least one layer, each once; got {raw['layers']}")
        if int(raw["num_experts"]) < 1:
            raise ValueError(f"config.json: moe.num_experts must be at least 1; got {raw['num_experts']}")
        named = {key: NamedArgs.from_dict(raw[key], f"moe.{key}") for key in ("router", "experts") if key in raw}
        return MoeSection(layers=layers, num_experts=int(raw["num_experts"]), **named)

    def to_dict(self) -> dict[str, Any]:
        raw = dataclasses.asdict(self)
        raw["layers"] = list(self.layers)
        return raw


@strict
class LlavaMoeConfig(LlavaConfig):  # type: ignore[misc]  # transformers types it as Any
    """`LlavaConfig` with two more keys.

    Attributes:
        projector: a name of `llava_moe.model.projector.PROJECTORS`.
        moe: the `MoeSection` as a plain dict, or None for a dense model.
    """

    model_type = "llava_moe"

    if TYPE_CHECKING:  # configs of any family; transformers' own annotation also admits None and plain dicts
        vision_config: Any
        text_config: Any

    projector: str = "mlp2x_gelu"
    moe: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.moe is not None:
            MoeSection.from_dict(self.moe)

    @property
    def moe_section(self) -> MoeSection | None:
        return None if self.moe is None else MoeSection.from_dict(self.moe)
