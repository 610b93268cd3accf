"""Top-p selection (Huang et al., 2403.07652): as many experts as it takes to gather the probability p.

    q = softmax(z)        S = the smallest set with sum(q_S) >= p, at least one expert and at most k_max
    g = q_S / sum(q_S)

Confident tokens use few experts, others more. Shapes: T tokens, E experts, K = k_max slots of a token.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from llava_moe.moe.component import check_k
from llava_moe.moe.selectors.base import Selection, Selector
from llava_moe.moe.types import RoutingContext


class TopP(Selector):
    """The best experts up to a cumulative probability.

    Raises:
        ValueError: p is not above 0 and at most 1, or k_max is not between 1 and E.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Selector.Config):
        """Options.

        Attributes:
            p: the probability to gather, above 0 and at most 1.
            k_max: most experts of a token; None admits all.
        """

        p: float = 0.4
        k_max: int | None = None

    config: TopP.Config
    k_option = "k_max"

    def __init__(self, num_experts: int, config: TopP.Config) -> None:
        super().__init__(num_experts, config)
        if not 0 < config.p <= 1:
            raise ValueError(f"selector top_p: p={config.p} must be above 0 and at most 1")
        self.slots = num_experts if config.k_max is None else config.k_max
        check_k("selector top_p (k_max)", self.slots, num_experts)

    @property
    def active_experts(self) -> float:
        return self.slots

    def forward(self, scores_TE: Tensor, context: RoutingContext) -> Selection:
        probs_TE = scores_TE.softmax(dim=-1)
        top_TK, index_TK = probs_TE.topk(self.slots, dim=-1)
        before_TK = top_TK.cumsum(dim=-1) - top_TK
        # The first slot has nothing before it; rounding must not empty it.
        off_TK = before_TK >= self.config.p
        off_TK[:, 0] = False
        kept_TK = top_TK.masked_fill(off_TK, 0.0)
        weight_TK = kept_TK / kept_TK.sum(dim=-1, keepdim=True)
        return Selection(probs_TE, index_TK.masked_fill(off_TK, self.num_experts), weight_TK)
