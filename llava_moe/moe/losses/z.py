"""The router z-loss of ST-MoE (2202.08906, eq. 5): mean over tokens of logsumexp(logits)^2.

Keeps the logits small, so that the softmax stays away from its numerical ends; it is 0 where sum(exp(z)) = 1.
"""

from __future__ import annotations

from torch import Tensor

from llava_moe.moe.losses.base import masked_mean
from llava_moe.moe.types import Routing, RoutingContext


def z(routing: Routing, context: RoutingContext) -> Tensor:
    return masked_mean(routing.logits_TE.logsumexp(dim=-1).square(), context.token_mask_T)
