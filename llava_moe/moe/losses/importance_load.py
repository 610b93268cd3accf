"""The two balance losses of noisy top-k gating (Shazeer et al., 1701.06538, eq. 6-11; LLaMA-MoE, HyperMoE).

    L = CV^2(sum_t g_te) + CV^2(sum_t q_te)      q_te = probability that expert e is in the top k of token t

The first sum is the importance, the second a load that is smooth where counts are not: the noise of the router is
thought to be drawn anew. Needs the extra `load_prob_TE` of the router `noisy_top_k`. It is 0 where all experts are
equal.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from llava_moe.moe.losses.base import BalanceLoss, squared_variation
from llava_moe.moe.types import Routing, RoutingContext

LOAD = "load_prob_TE"


class ImportanceLoad(BalanceLoss):
    """Squared variation of the combine weights plus that of the smooth load."""

    requires: ClassVar[tuple[str, ...]] = (LOAD,)
    provided_by: ClassVar[tuple[str, ...]] = ("noisy_top_k",)

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        mask_T1 = context.token_mask_T.unsqueeze(-1)
        importance_E = (routing.gates_TE() * mask_T1).sum(dim=0)
        load_E = (routing.extra(LOAD) * mask_T1).sum(dim=0)
        return squared_variation(importance_E) + squared_variation(load_E)
