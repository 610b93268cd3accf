"""Cosine scores (as in 2405.14131, which also says what is wrong with them).

    z_e = x . w_e / (|x| |w_e|) / temperature
Independent of the length of x and of w_e. Shapes: T tokens, D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from llava_moe.moe.scorers.base import Scorer, Scores, copy_first_of_group, float32_linear, refuse_negative
from llava_moe.moe.scorers.temperature import Temperature
from llava_moe.moe.types import RoutingContext

# Least product of two lengths: a token of zeros scores 0 everywhere, and its gradient stays finite.
LEAST_NORM = 1e-6


class CosineScorer(Scorer):
    """The cosine between the token and the row of each expert.

    Raises:
        ValueError: the temperature is not above 0, or `init_std` is negative.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Scorer.Config):
        """Options.

        Attributes:
            temperature: what the cosines are divided by; at 1 they lie between -1 and 1, so a softmax over them is
                nearly flat.
            learn_temperature: whether it is learned, starting from `temperature`.
            init_std: standard deviation of the initial rows; only their direction matters to the scores.
        """

        temperature: float = 1.0
        learn_temperature: bool = False
        init_std: float = 0.02

    config: CosineScorer.Config

    def __init__(self, hidden: int, num_experts: int, config: CosineScorer.Config) -> None:
        super().__init__(hidden, num_experts, config)
        refuse_negative("scorer cosine", init_std=config.init_std)
        self.temperature = Temperature("scorer cosine", config.temperature, config.learn_temperature)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=self.config.init_std, generator=generator)
        self.temperature.reset_parameters()

    def added_norms(self) -> tuple[float, float]:
        """What is added to the length of the token and of the expert's row."""
        return 0.0, 0.0

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Scores:
        to_token, to_row = self.added_norms()
        token_T1 = torch.linalg.vector_norm(x_TD.float(), dim=-1, keepdim=True) + to_token
        row_E = torch.linalg.vector_norm(self.weight.float(), dim=-1) + to_row
        cosine_TE = float32_linear(x_TD, self.weight) / (token_T1 * row_E).clamp(min=LEAST_NORM)
        logits_TE = self.temperature(cosine_TE)
        return Scores(logits_TE, logits_TE)

    def tie_rows(self, group: int) -> None:
        copy_first_of_group(self.weight, group)
