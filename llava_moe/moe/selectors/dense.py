"""Dense selection: every expert, weighted by its probability; what sparse methods approximate.

Shapes: T tokens, E experts, K = E slots of a token.
"""

from __future__ import annotations

from torch import Tensor

from llava_moe.moe.selectors.base import Selection, Selector
from llava_moe.moe.types import RoutingContext


class DenseSoftmax(Selector):
    """All experts, best first."""

    k_option = None

    @property
    def active_experts(self) -> float:
        return self.num_experts

    def forward(self, scores_TE: Tensor, context: RoutingContext) -> Selection:
        probs_TE = scores_TE.softmax(dim=-1)
        weight_TK, index_TK = probs_TE.sort(dim=-1, descending=True)
        return Selection(probs_TE, index_TK, weight_TK)
