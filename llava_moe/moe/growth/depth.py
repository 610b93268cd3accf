"""Growth in depth (2408.06567): where the layers of a deeper decoder come from. None of it keeps the function.

    stack          layer l from l mod L_s
    interpolate    layer l from floor(l L_s / L_t)        (the paper prints L_t / L_s, which would leave the source)

L_s and L_t are the numbers of layers of the source and the target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from llava_moe.moe.growth.base import WIDTHS, Grower
from llava_moe.moe.growth.shape import LLAMA_NAMES, DecoderNames, DecoderShape
from llava_moe.registry import near_misses


def stacked(layer: int, source: int, target: int) -> int:
    """All source layers in order, then again from the first."""
    return layer % source


def interpolated(layer: int, source: int, target: int) -> int:
    """Each source layer is repeated in its place."""
    return layer * source // target


DEPTHS: dict[str, Callable[[int, int, int], int]] = {"stack": stacked, "interpolate": interpolated}


def depth_rule(where: str, name: str) -> Callable[[int, int, int], int]:
    """A rule of `DEPTHS`; raises ValueError for an unknown one."""
    if name not in DEPTHS:
        raise ValueError(f"{where}: unknown depth {name!r}; {near_misses(name, list(DEPTHS))}")
    return DEPTHS[name]


class _Depth(Grower):
    """Grows in depth alone."""

    rule: str

    @dataclasses.dataclass(frozen=True)
    class Config(Grower.Config):
        """No options."""

    def __init__(
        self, config: _Depth.Config, source: DecoderShape, target: DecoderShape, names: DecoderNames = LLAMA_NAMES
    ) -> None:
        super().__init__(config, source, target, names)
        for key in WIDTHS:
            if getattr(source, key) != getattr(target, key):
                raise ValueError(
                    f"grower {type(self).__name__} changes the number of layers only, but {key} goes from "
                    f"{getattr(source, key)} to {getattr(target, key)}; use fpi, aki or aki_pro"
                )

    @staticmethod
    def exact(source: DecoderShape, target: DecoderShape) -> bool:
        return source == target

    def source_layer(self, layer: int) -> int:
        return DEPTHS[self.rule](layer, self.source.layers, self.target.layers)


class Stack(_Depth):
    """The whole stack of layers once more on top."""

    rule = "stack"


class Interpolate(_Depth):
    """Each layer again right after itself."""

    rule = "interpolate"
