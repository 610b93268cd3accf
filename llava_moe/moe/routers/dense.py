"""Dense routing: every token uses every expert; the bound from above that sparse routers are compared with.

    g = softmax(x W^T)

Shapes: D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.routers.base import Router
from llava_moe.moe.routers.scored import ScoredRouter
from llava_moe.moe.scorers import LinearScorer
from llava_moe.moe.selectors.dense import DenseSoftmax


class DenseRouter(ScoredRouter):
    """A linear scorer and all experts."""

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            init_std: standard deviation of the initial scorer weights.
        """

        init_std: float = 0.02

    config: DenseRouter.Config

    def make_scorer(self) -> LinearScorer:
        return LinearScorer(self.hidden, self.num_experts, LinearScorer.Config(init_std=self.config.init_std))

    def make_selector(self) -> DenseSoftmax:
        return DenseSoftmax(self.num_experts, DenseSoftmax.Config())
