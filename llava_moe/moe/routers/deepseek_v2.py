"""DeepSeek-V2 routing (2405.04434): softmax probabilities, experts from few groups (there: devices) for each token.

    p = softmax(x W^T)        a group scores its best p        S = top-k within the best groups        g = scale * p_S

The model itself: 160 experts in 8 groups of which 3 are kept, k = 6, scale 16, two shared experts.
Shapes: D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.routers.base import Router
from llava_moe.moe.routers.scored import ScoredRouter
from llava_moe.moe.scorers import LinearScorer
from llava_moe.moe.selectors.group_limited import GroupLimited


class DeepSeekV2Router(ScoredRouter):
    """A linear scorer and group-limited softmax top-k; the controller loss_free_bias may be used with it."""

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
            num_groups: groups of consecutive experts, a divisor of E; 1 puts no limit.
            topk_groups: groups that a token may use.
            renormalise: whether the weights are divided by their sum.
            scale: what the weights are multiplied by.
            init_std: standard deviation of the initial scorer weights.
        """

        k: int = 2
        num_groups: int = 1
        topk_groups: int = 1
        renormalise: bool = False
        scale: float = 1.0
        init_std: float = 0.02

    config: DeepSeekV2Router.Config

    def make_scorer(self) -> LinearScorer:
        return LinearScorer(self.hidden, self.num_experts, LinearScorer.Config(init_std=self.config.init_std))

    def make_selector(self) -> GroupLimited:
        config = self.config
        options = GroupLimited.Config(
            k=config.k,
            num_groups=config.num_groups,
            topk_groups=config.topk_groups,
            score="softmax",
            group_score="max",
            renormalise=config.renormalise,
            scale=config.scale,
        )
        return GroupLimited(self.num_experts, options)
