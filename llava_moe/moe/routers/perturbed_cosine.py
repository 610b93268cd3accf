"""Perturbed cosine routing (Nguyen et al., 2405.14131).

    z_e = x . w_e / ((|x| + theta1) (|w_e| + theta2)) / temperature        then any selector

Shapes: D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.routers.cosine import CosineRouter
from llava_moe.moe.scorers.perturbed_cosine import PerturbedCosineScorer


class PerturbedCosineRouter(CosineRouter):
    """A perturbed cosine scorer; LibMoE's first version has the selector double_softmax with a bias."""

    @dataclasses.dataclass(frozen=True)
    class Config(CosineRouter.Config):
        """Options.

        Attributes:
            k, selector, selector_args, temperature, learn_temperature, init_std: as for the router cosine.
            theta1: added to the length of the token.
            theta2: added to the length of the expert's row.
        """

        theta1: float = 0.1
        theta2: float = 0.1

    config: PerturbedCosineRouter.Config

    def make_scorer(self) -> PerturbedCosineScorer:
        config = self.config
        options = PerturbedCosineScorer.Config(
            config.temperature, config.learn_temperature, config.init_std, config.theta1, config.theta2
        )
        return PerturbedCosineScorer(self.hidden, self.num_experts, options)
