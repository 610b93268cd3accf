"""Perturbed cosine scores (Nguyen et al., 2405.14131): constants in the lengths undo what is degenerate in the cosine.

    z_e = x . w_e / ((|x| + theta1) (|w_e| + theta2)) / temperature
With theta1 = theta2 = 0 it is the cosine. Shapes: T tokens, D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.scorers.base import refuse_negative
from llava_moe.moe.scorers.cosine import CosineScorer


class PerturbedCosineScorer(CosineScorer):
    """The cosine with a constant added to either length.

    Raises:
        ValueError: a theta is negative, or the temperature is not above 0.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(CosineScorer.Config):
        """Options.

        Attributes:
            temperature, learn_temperature, init_std: as for the scorer cosine.
            theta1: added to the length of the token.
            theta2: added to the length of the expert's row.
        """

        theta1: float = 0.1
        theta2: float = 0.1

    config: PerturbedCosineScorer.Config

    def __init__(self, hidden: int, num_experts: int, config: PerturbedCosineScorer.Config) -> None:
        refuse_negative("scorer perturbed_cosine", theta1=config.theta1, theta2=config.theta2)
        super().__init__(hidden, num_experts, config)

    def added_norms(self) -> tuple[float, float]:
        return self.config.theta1, self.config.theta2
