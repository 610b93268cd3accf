"""Neighbours side by side in the channels, then a perceptron (InternVL 1.5, 2404.16821; Idefics3, 2408.12637)."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.projectors.base import MergingProjector, grid_side


class PixelShuffle(MergingProjector):
    """factor x factor neighbours become one vector of factor^2 C channels: M = N / factor^2.

    y = W2 act(W1 norm(merge(x)) + b1) + b2. Channels of the merged vector are ordered by row, column, channel, as in
    InternVL; names of the parameters are those of its projector in transformers.

    Raises:
        ValueError: (forward, num_output_tokens) the grid is not square or its side no multiple of the factor.
    """

    def build(self, config: LlavaMoeConfig) -> None:
        merged, bias = self.input_width * self.factor**2, config.multimodal_projector_bias
        self.layer_norm = nn.LayerNorm(merged)
        self.linear_1 = nn.Linear(merged, self.output_width, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(self.output_width, self.output_width, bias=bias)

    def forward(self, image_features: Tensor) -> Tensor:
        merged = self.layer_norm(merge_neighbours(image_features, self.factor))
        return self.linear_2(self.act(self.linear_1(merged)))

    @property
    def output_layer(self) -> nn.Linear:
        return self.linear_2


def merge_neighbours(features: Tensor, factor: int) -> Tensor:
    """(B, N, C) in reading order to (B, N / factor^2, factor^2 C).

    Raises:
        ValueError: N is no square grid with a side that is a multiple of the factor.
    """
    side = grid_side(features.shape[1], factor)
    cells = features.unflatten(1, (side // factor, factor, side // factor, factor))
    return cells.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
