"""The mean of neighbours, then a perceptron (DeCo, 2405.20985, section 4.1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.projectors.base import MergingProjector, from_grid, to_grid


class AveragePool(MergingProjector):
    """y = W2 act(W1 mean(x) + b1) + b2 over factor x factor neighbours: M = N / factor^2.

    Raises:
        ValueError: (forward, num_output_tokens) the grid is not square or its side no multiple of the factor.
    """

    def build(self, config: LlavaMoeConfig) -> None:
        width, bias = self.output_width, config.multimodal_projector_bias
        # One level down: a section `moe.projector` would otherwise take it for a plain perceptron and lose the pool.
        self.mlp = nn.Sequential(
            nn.Linear(self.input_width, width, bias=bias),
            ACT2FN[config.projector_hidden_act],
            nn.Linear(width, width, bias=bias),
        )

    def forward(self, image_features: Tensor) -> Tensor:
        self.num_output_tokens(image_features.shape[1])
        return self.mlp(from_grid(F.avg_pool2d(to_grid(image_features), self.factor)))

    @property
    def output_layer(self) -> nn.Module:
        return self.mlp[2]
