"""The diversity loss of CompeteSMoE (2505.13380): the chosen experts of a token should say different things.

    L = mean over tokens of the mean over pairs i != j of cos(o_i, o_j)      o = outputs of the token's chosen experts

Needs the extra `outputs_TKD` of the router `compete_smoe`, which is zero when the layer did not compete, and so is the
loss. Empty slots make no pair, and a token with fewer than two filled slots does not count.
Shapes: T tokens, K slots of a token, D hidden width.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from llava_moe.moe.losses.base import BalanceLoss, masked_mean
from llava_moe.moe.types import Routing, RoutingContext

OUTPUTS = "outputs_TKD"


class Diversity(BalanceLoss):
    """Mean cosine between the outputs of a token's experts."""

    requires: ClassVar[tuple[str, ...]] = (OUTPUTS,)
    provided_by: ClassVar[tuple[str, ...]] = ("compete_smoe",)

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        outputs_TKD = routing.extra(OUTPUTS)
        if not outputs_TKD.requires_grad and not any(outputs_TKD.stride()):
            # One zero seen as (T, K, D): the layer did not compete. In memory it would be the largest tensor here.
            return routing.logits_TE.sum() * 0.0
        filled_TK = (routing.index_TK < routing.num_experts).to(outputs_TKD.dtype).float()
        unit_TKD = F.normalize(outputs_TKD.float(), dim=-1) * filled_TK.unsqueeze(-1)
        # The sum over all pairs is the squared norm of the sum of the unit vectors; K of the terms are a vector's own.
        own_T = unit_TKD.square().sum(dim=(1, 2))
        pairs_T = unit_TKD.sum(dim=1).square().sum(dim=-1) - own_T
        count_T = filled_TK.sum(dim=-1)
        cosine_T = pairs_T / (count_T * (count_T - 1)).clamp(min=1)
        return masked_mean(cosine_T, context.token_mask_T & (count_T > 1))
