"""Function-preserving growth in width (FPI of 2408.06567, after bert2BERT 2110.07143 and Net2Net 1511.05641).

    W'[i, j] = W[g(i), g(j)] / n(g(j))        g(i) = i mod size, n(j) how many places have the source j

Exact when the number of layers stays and the hidden width grows by a whole factor: RMSNorm takes a mean over the hidden
width, which only equal numbers of copies leave alone. Query heads and the feed-forward width may grow to anything.
Copies of a neuron also get equal gradients, so the function learns slowly to use its new width; `aki` breaks that.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.growth.base import Grower
from llava_moe.moe.growth.depth import depth_rule
from llava_moe.moe.growth.shape import LLAMA_NAMES, DecoderNames, DecoderShape


class Fpi(Grower):
    """Copies of neurons and heads, divided among those that read them."""

    @dataclasses.dataclass(frozen=True)
    class Config(Grower.Config):
        """Options.

        Attributes:
            depth: where further layers come from, "stack" or "interpolate".
            require_exact: refuse two decoders between which this is not exact.
        """

        depth: str = "interpolate"
        require_exact: bool = False

    def __init__(
        self, config: Fpi.Config, source: DecoderShape, target: DecoderShape, names: DecoderNames = LLAMA_NAMES
    ) -> None:
        super().__init__(config, source, target, names)
        self._depth = depth_rule("grower Fpi", config.depth)
        if config.require_exact and not self.exact(source, target):
            raise ValueError(
                f"grower Fpi: require_exact, but hidden={target.hidden} must be a multiple of {source.hidden} and "
                f"layers={target.layers} must stay {source.layers}"
            )

    @staticmethod
    def exact(source: DecoderShape, target: DecoderShape) -> bool:
        return target.hidden % source.hidden == 0 and target.layers == source.layers

    def source_layer(self, layer: int) -> int:
        return self._depth(layer, self.source.layers, self.target.layers)
