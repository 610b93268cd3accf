"""The reward for null experts of TC-MoE (ICLR 2025): minus the mean probability of the null slots.

    L = -mean_t p_null      so a larger coefficient leaves more slots empty

The sign is that of LibMoE's code (2411.00918); the released model has the coefficient 0. Needs the extra `null_prob_T`
of the router `tc_moe`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from llava_moe.moe.losses.base import BalanceLoss, masked_mean
from llava_moe.moe.types import Routing, RoutingContext

NULL = "null_prob_T"


class NullReward(BalanceLoss):
    """Minus the mean probability that a slot stays empty."""

    requires: ClassVar[tuple[str, ...]] = (NULL,)
    provided_by: ClassVar[tuple[str, ...]] = ("tc_moe",)

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        return -masked_mean(routing.extra(NULL), context.token_mask_T)
