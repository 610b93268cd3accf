"""The router loss of CompeteSMoE (2505.13380): predict which experts would win if all were evaluated.

    L = mean over tokens and experts of (softmax(z) - softmax(a))^2      a = affinity, without gradient

Only tokens of layers that competed in this step count; the router `compete_smoe` says which by the extra `competes_T`
(1 where they did, else 0), and gives the affinities as `affinity_TE`.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from llava_moe.moe.losses.base import BalanceLoss, masked_mean
from llava_moe.moe.types import Routing, RoutingContext

AFFINITY, COMPETES = "affinity_TE", "competes_T"


class Competition(BalanceLoss):
    """Squared distance of the router's distribution from that of the experts' responses."""

    requires: ClassVar[tuple[str, ...]] = (AFFINITY, COMPETES)
    provided_by: ClassVar[tuple[str, ...]] = ("compete_smoe",)

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        target_TE = routing.extra(AFFINITY).detach().softmax(dim=-1)
        error_T = (routing.logits_TE.softmax(dim=-1) - target_TE).square().mean(dim=-1)
        return masked_mean(error_T, context.token_mask_T * routing.extra(COMPETES))
