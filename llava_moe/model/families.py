"""The LLaVA families: their classes, and the stock ones whose checkpoints they read.

    llava             one picture, whole                                      LlavaMoeForConditionalGeneration
    llava_next        tiles on any grid, several images, videos as frames     LlavaNextMoeForConditionalGeneration
    llava_onevision   the same, with a limit on the tiles' features           LlavaOnevisionMoeForConditionalGeneration

Each is dense or sparse by its config alone. A model's own model_type is that of the stock class with `_moe`, so that
transformers without this package refuses a checkpoint with experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from llava_moe.model.configuration import LlavaMoeConfig, LlavaNextMoeConfig, LlavaOnevisionMoeConfig
from llava_moe.model.modeling import LlavaMoeForConditionalGeneration, LlavaMoeModel
from llava_moe.model.tiled import (
    LlavaNextMoeForConditionalGeneration,
    LlavaNextMoeModel,
    LlavaOnevisionMoeForConditionalGeneration,
    LlavaOnevisionMoeModel,
)
from llava_moe.registry import Registry


@dataclass(frozen=True)
class Family:
    """A stock class and ours.

    Attributes:
        stock_type: model_type of the stock class, the name of the family.
        config, model, inner: our classes; `inner` is the model without its head.
        is_tiled: images come as tiles.
    """

    stock_type: str
    config: type[Any]
    model: type[Any]
    inner: type[Any]
    is_tiled: bool

    @property
    def model_type(self) -> str:
        """That of our class."""
        return str(self.config.model_type)


FAMILIES: Registry[Family] = Registry("model family")
for _family in (
    Family("llava", LlavaMoeConfig, LlavaMoeForConditionalGeneration, LlavaMoeModel, is_tiled=False),
    Family("llava_next", LlavaNextMoeConfig, LlavaNextMoeForConditionalGeneration, LlavaNextMoeModel, is_tiled=True),
    Family(
        "llava_onevision",
        LlavaOnevisionMoeConfig,
        LlavaOnevisionMoeForConditionalGeneration,
        LlavaOnevisionMoeModel,
        is_tiled=True,
    ),
):
    FAMILIES.register(_family.stock_type, _family)

MODEL_TYPES = tuple(name for family in map(FAMILIES.get, FAMILIES) for name in (family.model_type, family.stock_type))
"""Of all checkpoints that the programs read: ours and stock ones."""


def family_of(config: Any) -> Family | None:
    """The family that a config of ours or a stock one belongs to; None if to none."""
    kind = config if isinstance(config, str) else config.model_type
    families = [FAMILIES.get(name) for name in FAMILIES]
    return next((family for family in families if kind in (family.model_type, family.stock_type)), None)


def is_ours(config: Any) -> bool:
    """Whether it is a config of one of our classes."""
    return any(isinstance(config, FAMILIES.get(name).config) for name in FAMILIES)


def our_config(config: PretrainedConfig) -> Any:
    """A stock config of a family as ours, dense; any other config as it is."""
    family = family_of(config)
    if family is None or isinstance(config, family.config):
        return config
    return family.config(**{key: value for key, value in config.to_dict().items() if key != "model_type"})


def build_model(config: Any) -> Any:
    """The model of a config of ours, with initial weights.

    Raises:
        ValueError: the config belongs to no family.
    """
    family = family_of(config)
    if family is None:
        raise ValueError(f"{type(config).__name__} is the config of no LLaVA family ({', '.join(FAMILIES)})")
    return family.model(config)
