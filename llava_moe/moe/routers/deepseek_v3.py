"""DeepSeek-V3 routing (2412.19437): sigmoid scores, a selection bias in place of a balance loss, groups of experts.

    s = sigmoid(x W^T)        s' = s + b        a group scores the sum of its two best s'
    S = top-k of s' within the best groups        g = scale * s_S / sum(s_S)

b has no gradient: the controller loss_free_bias moves it. The model itself: 256 experts in 8 groups of which 4 are
kept, k = 8, scale 2.5, one shared expert. The scale is 1 here, with which copied experts equal the dense block.
Shapes: D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.routers.base import Router
from llava_moe.moe.routers.scored import ScoredRouter
from llava_moe.moe.scorers import LinearScorer
from llava_moe.moe.selectors.group_limited import GroupLimited


class DeepSeekV3Router(ScoredRouter):
    """A linear scorer and group-limited sigmoid top-k; the bias is the buffer `selector.selection_bias_E`."""

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
        renormalise: bool = True
        scale: float = 1.0
        init_std: float = 0.02

    config: DeepSeekV3Router.Config

    def make_scorer(self) -> LinearScorer:
        return LinearScorer(self.hidden, self.num_experts, LinearScorer.Config(init_std=self.config.init_std))

    def make_selector(self) -> GroupLimited:
        config = self.config
        options = GroupLimited.Config(
            k=config.k,
            num_groups=config.num_groups,
            topk_groups=config.topk_groups,
            score="sigmoid",
            group_score="top2",
            renormalise=config.renormalise,
            scale=config.scale,
        )
        return GroupLimited(self.num_experts, options)
