"""Growth in width with advanced knowledge (AKI of bert2BERT 2110.07143; AKI-Pro of AquilaMoE 2408.06567).

    W'_l[i, .] = FPI(W_l)[i, .] for i < size, else FPI(W_(l+1))[i, .]

As FPI, but what a matrix of a layer makes anew - the places of its first axis that are copies under FPI - comes from
the next source layer, expanded in the same way; the last layer has no next one and copies its own. So new neurons are
no twins of old ones, and training need not break a symmetry first. The function is not kept. RMSNorm gains and
embeddings are as in FPI.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llava_moe.moe.growth.base import Grower, Read
from llava_moe.moe.growth.depth import depth_rule
from llava_moe.moe.growth.shape import LLAMA_NAMES, DecoderNames, DecoderShape, Entry


class Aki(Grower):
    """New neurons and heads from the layer above."""

    @dataclasses.dataclass(frozen=True)
    class Config(Grower.Config):
        """Options.

        Attributes:
            depth: where further layers come from, "stack" or "interpolate".
        """

        depth: str = "interpolate"

    def __init__(
        self, config: Aki.Config, source: DecoderShape, target: DecoderShape, names: DecoderNames = LLAMA_NAMES
    ) -> None:
        super().__init__(config, source, target, names)
        self._depth = depth_rule("grower Aki", config.depth)

    @staticmethod
    def exact(source: DecoderShape, target: DecoderShape) -> bool:
        return source == target

    def source_layer(self, layer: int) -> int:
        return self._depth(layer, self.source.layers, self.target.layers)

    def widen(self, entry: Entry, layer: int | None, read: Read) -> Tensor:
        own = super().widen(entry, layer, read)
        new = self._places[entry.axes[0]].new
        last = self.source.layers - 1
        if layer is None or layer == last or entry.kind not in ("matrix", "bias") or not bool(new.any()):
            return own
        above = super().widen(entry, layer + 1, read)
        new = new.to(own.device).reshape(-1, *[1] * (own.ndim - 1))
        return torch.where(new, above, own)


class AkiPro(Aki):
    """AKI in width, interpolation in depth; the rule for grouped queries is that of every grower."""

    @dataclasses.dataclass(frozen=True)
    class Config(Grower.Config):
        """No options."""

    def __init__(
        self, config: AkiPro.Config, source: DecoderShape, target: DecoderShape, names: DecoderNames = LLAMA_NAMES
    ) -> None:
        super().__init__(Aki.Config(depth="interpolate"), source, target, names)
