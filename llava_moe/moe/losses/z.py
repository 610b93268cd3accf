"""The router z-loss of ST-MoE (2202.08906, eq. 5).

    L = mean_t logsumexp(z_t)^2

Keeps the logits small, so that the softmax stays away from its numerical ends; it is 0 where sum(exp(z)) = 1.
"""

from __future__ import annotations

from torch import Tensor

from llava_moe.moe.losses.base import BalanceLoss, masked_mean
from llava_moe.moe.types import Routing, RoutingContext


class RouterZ(BalanceLoss):
    """Mean squared logsumexp of the logits."""

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        return masked_mean(routing.logits_TE.logsumexp(dim=-1).square(), context.token_mask_T)
