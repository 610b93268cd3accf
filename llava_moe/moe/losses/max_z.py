"""The max-z loss that AquilaMoE (2408.06567) trains with.

    L = mean_t max_e(z_te)^2

The paper names it and prints no formula; this is the one of Baichuan 2 (2309.10305) applied to router
logits. It touches the largest logit of a token only, where the z-loss touches all.
"""

from __future__ import annotations

from torch import Tensor

from llava_moe.moe.losses.base import BalanceLoss, masked_mean
from llava_moe.moe.types import Routing, RoutingContext


class MaxZ(BalanceLoss):
    """Mean squared largest logit."""

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        return masked_mean(routing.logits_TE.amax(dim=-1).square(), context.token_mask_T)
