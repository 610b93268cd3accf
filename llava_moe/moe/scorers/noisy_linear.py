"""Noisy linear scores (Shazeer et al., 1701.06538, eq. 4): trainable noise spreads the tokens while training.

    z = x W^T                                     what the losses see
    selection = z + eps * std                     in training; eps ~ N(0, 1) for each token and expert
    std = softplus(x W_noise^T) + noise_floor
In evaluation the selection is z. Shapes: T tokens, D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_moe.moe.scorers.base import Scorer, Scores, copy_first_of_group, float32_linear, refuse_negative
from llava_moe.moe.types import RoutingContext

NOISE_STD = "noise_std_TE"


class NoisyLinearScorer(Scorer):
    """A linear scorer with a second matrix for the size of the noise.

    Provides the extra `noise_std_TE`, float32: the standard deviation of the noise, also in evaluation, where none is
    added.

    Raises:
        ValueError: `init_std` or `noise_floor` is negative.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Scorer.Config):
        """Options.

        Attributes:
            init_std: standard deviation of the initial scorer weights; the paper starts from 0. W_noise always does.
            noise_floor: least standard deviation of the noise.
        """

        init_std: float = 0.0
        noise_floor: float = 1e-2

    config: NoisyLinearScorer.Config
    stochastic = True
    extras = (NOISE_STD,)

    def __init__(self, hidden: int, num_experts: int, config: NoisyLinearScorer.Config) -> None:
        super().__init__(hidden, num_experts, config)
        refuse_negative("scorer noisy_linear", init_std=config.init_std, noise_floor=config.noise_floor)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, hidden))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=self.config.init_std, generator=generator)
        nn.init.zeros_(self.noise_weight)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Scores:
        logits_TE = float32_linear(x_TD, self.weight)
        std_TE = F.softplus(float32_linear(x_TD, self.noise_weight)) + self.config.noise_floor
        noisy_TE = logits_TE + torch.randn_like(logits_TE) * std_TE if self.training else logits_TE
        return Scores(logits_TE, noisy_TE, {NOISE_STD: std_TE})

    def tie_rows(self, group: int) -> None:
        copy_first_of_group(self.weight, group)
        copy_first_of_group(self.noise_weight, group)
