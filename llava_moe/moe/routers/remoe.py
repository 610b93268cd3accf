"""ReMoE routing (2412.14711): ReLU gates, a variable number of experts, differentiable everywhere.

    g = ReLU(x W^T)        S = {e : g_e > 0}

Needs the balance loss relu_l1 with the controller remoe_lambda, which together keep the mean number of experts at k;
without them about half of the gates stay open. Shapes: D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.routers.base import Router
from llava_moe.moe.routers.scored import ScoredRouter
from llava_moe.moe.scorers import LinearScorer
from llava_moe.moe.selectors.relu import ReLUSelector


class ReMoERouter(ScoredRouter):
    """A linear scorer and ReLU gates."""

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: experts of a token in the mean, which training is regulated to.
            init_std: standard deviation of the initial scorer weights.
        """

        k: int = 1
        init_std: float = 0.01

    config: ReMoERouter.Config

    def make_scorer(self) -> LinearScorer:
        return LinearScorer(self.hidden, self.num_experts, LinearScorer.Config(init_std=self.config.init_std))

    def make_selector(self) -> ReLUSelector:
        return ReLUSelector(self.num_experts, ReLUSelector.Config(k=self.config.k))
