"""The configurations of our model classes: the stock ones plus a projector, a `moe` section, and the merge of tiles."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig

from llava_moe.model.merge import frame_rule, merge_rule
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


PARTS = ("decoder", "vision", "projector")


@dataclasses.dataclass(frozen=True)
class MoePart:
    """The experts of one part of the model: the decoder, the vision tower or the projector.

    Attributes:
        layers: layers whose feed-forward block is replaced, ascending; (0,) for a projector.
        num_experts: feed-forward experts of each of these layers.
        router: a name of `llava_moe.moe.ROUTERS` with its options.
        experts: a name of `llava_moe.moe.EXPERTS` with its options.
        shared: options of `llava_moe.moe.SharedExperts`, or None.
        capacity: options of `llava_moe.moe.Capacity`, or None for dropless.
        expert_width: width of one expert; None takes that of the dense block.
        allow_noncausal: admits a router that looks at later tokens into the decoder.
    """

    layers: tuple[int, ...]
    num_experts: tuple[int, ...]
    router: NamedArgs = NamedArgs("top_k")
    experts: NamedArgs = NamedArgs("stacked")
    shared: dict[str, Any] | None = None
    capacity: dict[str, Any] | None = None
    expert_width: int | None = None
    allow_noncausal: bool = False

    @staticmethod
    def from_dict(raw: Any, where: str) -> MoePart:
        """Parses one part of a config.json; `num_experts` may be one number for all layers.

        Raises:
            ValueError: a key is unknown or missing, or a value makes no sense; `where` says which part.
        """
        known = [field.name for field in dataclasses.fields(MoePart)]
        if not isinstance(raw, dict):
            raise ValueError(f"config.json: {where} must be a mapping; got {raw!r}")
        for key in raw:
            if key not in known:
                raise ValueError(f"config.json: {where} has no key {key!r}; {near_misses(key, known)}")
        for key in ("layers", "num_experts"):
            if key not in raw:
                raise ValueError(f"config.json: {where}.{key} is missing")
        layers = tuple(int(i) for i in raw["layers"])
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(
                f"config.json: {where}.layers must name at least one layer, each once; got {raw['layers']}"
            )
        layers, counts = _sorted_counts(layers, raw["num_experts"], where)
        named: dict[str, Any] = {
            key: NamedArgs.from_dict(raw[key], f"{where}.{key}") for key in ("router", "experts") if key in raw
        }
        rest: dict[str, Any] = {
            key: raw[key] for key in ("shared", "capacity", "expert_width", "allow_noncausal") if key in raw
        }
        return MoePart(layers=layers, num_experts=counts, **named, **rest)

    def to_dict(self) -> dict[str, Any]:
        raw = dataclasses.asdict(self)
        counts = set(self.num_experts)
        raw["layers"] = list(self.layers)
        raw["num_experts"] = counts.pop() if len(counts) == 1 else list(self.num_experts)
        return raw


def _sorted_counts(layers: tuple[int, ...], raw: Any, where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers in ascending order and the number of experts of each."""
    counts = list(raw) if isinstance(raw, list | tuple) else [raw] * len(layers)
    if len(counts) != len(layers):
        raise ValueError(
            f"config.json: {where}.num_experts names {len(counts)} numbers for {len(layers)} layers; give one number, "
            "or one for each layer"
        )
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts):
        raise ValueError(f"config.json: {where}.num_experts must be at least 1; got {raw}")
    pairs = sorted(zip(layers, counts, strict=True))
    return tuple(layer for layer, _ in pairs), tuple(count for _, count in pairs)


@dataclasses.dataclass(frozen=True)
class MoeSection:
    """Where the experts sit and what they are; travels in config.json so that `from_pretrained` rebuilds the modules.

    At least one part has experts.
    """

    decoder: MoePart | None = None
    vision: MoePart | None = None
    projector: MoePart | None = None

    def parts(self) -> dict[str, MoePart]:
        """The parts that have experts, by name."""
        named = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in named.items() if part is not None}

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> MoeSection:
        """Parses the section of a config.json.

        Raises:
            ValueError: a key is unknown, no part has experts, or a part is refused.
        """
        for key in raw:
            if key not in PARTS:
                raise ValueError(f"config.json: moe has no key {key!r}; {near_misses(key, list(PARTS))}")
        parts = {key: MoePart.from_dict(part, f"moe.{key}") for key, part in raw.items() if part is not None}
        if not parts:
            raise ValueError(f"config.json: moe names no part with experts; known: {', '.join(PARTS)}")
        return MoeSection(**parts)

    def to_dict(self) -> dict[str, Any]:
        return {name: part.to_dict() for name, part in self.parts().items()}


@strict
class LlavaMoeConfig(LlavaConfig):  # type: ignore[misc]  # transformers types it as Any
    """`LlavaConfig` with six more keys.

    Attributes:
        projector: a name of `llava_moe.model.projectors.PROJECTORS`.
        projector_args: its options, see the `Config` of its class; None takes their defaults.
        moe: the `MoeSection` as a plain dict, or None for a dense model.
        logit_scale, logit_softcap: what the decoder does to its logits after the vocabulary projection, see `head.py`;
            None, as in every stock checkpoint, is nothing.
        logit_bias: whether the projection has a bias, as Phi-2's has.
        vocabulary_growth: what assembling added to the decoder's vocabulary: `tokens`, and the number of rows `before`
            and `after`; None where nothing was. For the record.
    """

    model_type = "llava_moe"

    if TYPE_CHECKING:  # configs of any family; transformers' own annotation also admits None and plain dicts
        vision_config: Any
        text_config: Any

    projector: str = "mlp2x_gelu"
    projector_args: dict[str, Any] | None = None
    moe: dict[str, Any] | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    logit_bias: bool = False
    vocabulary_growth: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.moe is not None:
            MoeSection.from_dict(self.moe)

    @property
    def moe_section(self) -> MoeSection | None:
        return None if self.moe is None else MoeSection.from_dict(self.moe)


class _TiledConfig:
    """What the configs of the two families with tiles have in common; their keys are in the classes themselves."""

    if TYPE_CHECKING:
        vision_aspect_ratio: str
        merge: dict[str, Any] | None
        frames: dict[str, Any] | None
        moe: dict[str, Any] | None

    def check(self) -> None:
        """Raises ValueError when a key of ours has a value that is not allowed."""
        merge_rule(self)
        frame_rule(self)
        if self.moe is not None:
            MoeSection.from_dict(self.moe)

    @property
    def moe_section(self) -> MoeSection | None:
        return None if self.moe is None else MoeSection.from_dict(self.moe)


@strict
class LlavaNextMoeConfig(_TiledConfig, LlavaNextConfig):  # type: ignore[misc]  # transformers types it as Any
    """`LlavaNextConfig`, the keys of `LlavaMoeConfig`, and how tiles and frames become a sequence.

    Attributes:
        vision_aspect_ratio: "anyres", or "anyres_max_N" for a limit of N tiles' features (as in LLaVA-OneVision).
        merge: options of `llava_moe.model.merge.MergeRule` but max_tiles; None takes their defaults (spatial_unpad).
        frames: options of `llava_moe.model.merge.FrameRule`; None takes their defaults.
    """

    model_type = "llava_next_moe"

    if TYPE_CHECKING:
        vision_config: Any
        text_config: Any

    vision_aspect_ratio: str = "anyres"
    merge: dict[str, Any] | None = None
    frames: dict[str, Any] | None = None
    projector: str = "mlp2x_gelu"
    projector_args: dict[str, Any] | None = None
    moe: dict[str, Any] | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    logit_bias: bool = False
    vocabulary_growth: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check()


@strict
class LlavaOnevisionMoeConfig(_TiledConfig, LlavaOnevisionConfig):  # type: ignore[misc]
    """`LlavaOnevisionConfig` with the keys of `LlavaNextMoeConfig`; `vision_aspect_ratio` is the stock key.

    Attributes:
        image_seq_length: tokens of a tile; None is a patch each.
    """

    model_type = "llava_onevision_moe"

    if TYPE_CHECKING:
        vision_config: Any
        text_config: Any

    image_seq_length: int | None = None
    merge: dict[str, Any] | None = None
    frames: dict[str, Any] | None = None
    projector: str = "mlp2x_gelu"
    projector_args: dict[str, Any] | None = None
    moe: dict[str, Any] | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    logit_bias: bool = False
    vocabulary_growth: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.image_seq_length is None:
            self.image_seq_length = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        self.check()
