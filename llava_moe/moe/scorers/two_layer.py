"""Scores of a small network, z = tanh(x W_1^T) W_2^T: the default of MoE++ (2410.07348) and of LLaMA-MoE (2406.16554).

Shapes: T tokens, D hidden width, E experts, M = multiple x E.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from llava_moe.moe.scorers.base import Scorer, Scores, copy_first_of_group, float32_linear, refuse_negative
from llava_moe.moe.types import RoutingContext


class TwoLayerScorer(Scorer):
    """D -> M -> E with a tanh between, without biases.

    Raises:
        ValueError: the multiple is below 1, or `init_std` is negative.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Scorer.Config):
        """Options.

        Attributes:
            multiple: M over E: 8 in MoE++, 1 in LLaMA-MoE.
            init_std: standard deviation of the initial weights.
        """

        multiple: int = 8
        init_std: float = 0.02

    config: TwoLayerScorer.Config

    def __init__(self, hidden: int, num_experts: int, config: TwoLayerScorer.Config) -> None:
        super().__init__(hidden, num_experts, config)
        refuse_negative("scorer two_layer", init_std=config.init_std)
        if config.multiple < 1:
            raise ValueError(f"scorer two_layer: multiple={config.multiple} must be at least 1")
        middle = config.multiple * num_experts
        self.in_weight = nn.Parameter(torch.empty(middle, hidden))
        self.out_weight = nn.Parameter(torch.empty(num_experts, middle))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        for parameter in (self.in_weight, self.out_weight):
            nn.init.normal_(parameter, std=self.config.init_std, generator=generator)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Scores:
        logits_TE = float32_linear(float32_linear(x_TD, self.in_weight).tanh(), self.out_weight)
        return Scores(logits_TE, logits_TE)

    def tie_rows(self, group: int) -> None:
        copy_first_of_group(self.out_weight, group)
