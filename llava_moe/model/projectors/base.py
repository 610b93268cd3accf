"""What every projector is: vision features (B, N, C) to decoder embeddings (B, M, D), with M known from N alone.

B pictures, N features of C channels each (a square grid in reading order wherever a projector says so), M embeddings of
the decoder's width D. Initial values are transformers' own unless a projector says otherwise: normal of the config's
`initializer_range` (0.02) for linear maps and convolutions, zero for biases, one and zero for norms. `assemble` then
scales the output to the size of word embeddings by `scale_output`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.registry import near_misses


class Projector(nn.Module, ABC):
    """Maps N feature vectors of a picture to `num_output_tokens(N)` embeddings.

    A subclass builds its modules in `build` and has its options in a nested frozen dataclass `Config`; their values
    come from `projector_args` of the model's config.

    Args:
        config: of the whole model; `projector_args` are the options.

    Raises:
        ValueError: an option is unknown or has a value that makes no sense.
    """

    @dataclasses.dataclass(frozen=True)
    class Config:
        """No options."""

    options: Any  # the Config of the subclass
    keeps_grid: ClassVar[bool] = True  # the embeddings of a square grid of features are one in reading order

    def __init__(self, config: LlavaMoeConfig) -> None:
        super().__init__()
        self.options = parse_options(type(self).Config, config.projector_args or {})
        self.input_width = input_width(config)
        self.output_width = int(config.text_config.hidden_size)
        self.build(config)

    @abstractmethod
    def build(self, config: LlavaMoeConfig) -> None:
        """Makes the modules; `options`, `input_width` (C) and `output_width` (D) are set."""

    @abstractmethod
    def forward(self, image_features: Tensor) -> Tensor:
        """(B, N, C) to (B, M, D)."""

    def num_output_tokens(self, num_input_tokens: int) -> int:
        """How many embeddings N feature vectors become; data code reserves that many placeholders.

        Raises:
            ValueError: the projector cannot take so many features.
        """
        return num_input_tokens

    @property
    @abstractmethod
    def output_layer(self) -> nn.Module | None:
        """The last map, whose `weight` and `bias` set the scale of the embeddings; None if there is none."""

    @torch.no_grad()
    def scale_output(self, factor: Tensor) -> None:
        """Multiplies the embeddings by a factor, by means of the parameters of the last map."""
        for parameter in () if self.output_layer is None else self.output_layer.parameters(recurse=False):
            parameter.mul_(factor)


class GridProjector(Projector):
    """A projector that merges factor x factor neighbours, and so needs a square grid without a class token."""

    @property
    @abstractmethod
    def factor(self) -> int:
        """Merged cells along one side."""

    def num_output_tokens(self, num_input_tokens: int) -> int:
        return (grid_side(num_input_tokens, self.factor) // self.factor) ** 2


class MergingProjector(GridProjector):
    """One whose factor the recipe chooses."""

    @dataclasses.dataclass(frozen=True)
    class Config(Projector.Config):
        """Options.

        Attributes:
            factor: cells along one side that become one: 2 makes a quarter of the tokens.
        """

        factor: int = 2

        def __post_init__(self) -> None:
            check_at_least(self, "factor", 1)

    @property
    def factor(self) -> int:
        return int(self.options.factor)


def parse_options(kind: type[Any], raw: Mapping[str, Any]) -> Any:
    """An instance of an options class.

    Raises:
        ValueError: a key is unknown, a value has the wrong type, or the class refuses a value.
    """
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key, value in raw.items():
        if key not in known:
            raise ValueError(f"projector_args has no key {key!r}; {near_misses(key, list(known))}")
        default = known[key].default
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise ValueError(f"projector_args.{key}={value!r}: must be a {type(default).__name__}")
    return kind(**raw)


def check_at_least(options: Any, key: str, least: int) -> None:
    """Raises ValueError when an option is below its least value."""
    value = getattr(options, key)
    if value < least:
        raise ValueError(f"projector_args.{key}={value}: must be at least {least}")


def input_width(config: LlavaMoeConfig) -> int:
    """Channels C of the selected features; several feature layers are concatenated."""
    num_layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    return int(config.vision_config.hidden_size) * num_layers


def grid_side(num_tokens: int, factor: int = 1) -> int:
    """The side of the square grid of N features.

    Raises:
        ValueError: N is no square, or the side no multiple of the factor.
    """
    side = isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(
            f"the projector needs a square grid of features, and the tower gives {num_tokens} of them; drop the class "
            "token with vision_feature_select_strategy=default, or use a square image"
        )
    if side % factor:
        raise ValueError(
            f"the projector merges {factor} x {factor} features, and the grid of {side} x {side} is no multiple of "
            f"that; choose an image size with a multiple of {factor} patches along a side, or another factor"
        )
    return side


def to_grid(features: Tensor) -> Tensor:
    """(B, N, C) in reading order to (B, C, side, side)."""
    side = grid_side(features.shape[1])
    return features.transpose(1, 2).unflatten(2, (side, side))


def from_grid(grid: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h * w, C) in reading order."""
    return grid.flatten(2).transpose(1, 2)
