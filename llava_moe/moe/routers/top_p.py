"""Top-p routing (Huang et al., 2403.07652): confident tokens use few experts, others more.

    q = softmax(x W^T)        S = the smallest set with sum(q_S) >= p, at most k_max        g = q_S / sum(q_S)

Shapes: D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.routers.base import Router
from llava_moe.moe.routers.scored import ScoredRouter
from llava_moe.moe.scorers import LinearScorer
from llava_moe.moe.selectors.top_p import TopP


class TopPRouter(ScoredRouter):
    """A linear scorer and top-p selection."""

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            p: the probability that a token's experts gather, above 0 and at most 1.
            k_max: most experts of a token; None admits all.
            init_std: standard deviation of the initial scorer weights.
        """

        p: float = 0.4
        k_max: int | None = None
        init_std: float = 0.02

    config: TopPRouter.Config

    def make_scorer(self) -> LinearScorer:
        return LinearScorer(self.hidden, self.num_experts, LinearScorer.Config(init_std=self.config.init_std))

    def make_selector(self) -> TopP:
        return TopP(self.num_experts, TopP.Config(p=self.config.p, k_max=self.config.k_max))
