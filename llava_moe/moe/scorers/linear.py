"""The usual scorer: z = x W^T (+ b). Shapes: T tokens, D hidden width, E experts."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from llava_moe.moe.scorers.base import Scorer, Scores, copy_first_of_group, float32_linear, refuse_negative
from llava_moe.moe.types import RoutingContext


class LinearScorer(Scorer):
    """One row of weights for each expert.

    Raises:
        ValueError: `init_std` is negative.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Scorer.Config):
        """Options.

        Attributes:
            bias: whether there is a bias (initially zero).
            init_std: standard deviation of the initial weights.
        """

        bias: bool = False
        init_std: float = 0.02

    config: LinearScorer.Config

    def __init__(self, hidden: int, num_experts: int, config: LinearScorer.Config) -> None:
        super().__init__(hidden, num_experts, config)
        refuse_negative("scorer linear", init_std=config.init_std)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden))
        self.bias = nn.Parameter(torch.empty(num_experts)) if config.bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=self.config.init_std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Scores:
        logits_TE = float32_linear(x_TD, self.weight, self.bias)
        return Scores(logits_TE, logits_TE)

    def tie_rows(self, group: int) -> None:
        for parameter in self.parameters():
            copy_first_of_group(parameter, group)
