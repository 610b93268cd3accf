"""The entropy regulariser of sigma-MoE (2310.10837): minus the entropy of the mean selection distribution.

    L = sum_e P_e ln P_e      P = mean over tokens of softmax(z)

It is -ln E when the experts are used alike and 0 when one takes everything. The softmax is over the logits also where
the router itself uses sigmoids. Shapes: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_moe.moe.losses.base import BalanceLoss
from llava_moe.moe.types import Routing, RoutingContext

_NOWHERE = -1e30  # the logarithm of nothing, but finite: it is multiplied by 0 where all tokens are padding


class Entropy(BalanceLoss):
    """Minus the entropy of the mean softmax, in log space."""

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        mask_T = context.token_mask_T
        log_TE = routing.logits_TE.log_softmax(dim=-1).masked_fill(~mask_T.unsqueeze(-1), _NOWHERE)
        log_E = torch.logsumexp(log_TE, dim=0).clamp(min=_NOWHERE) - mask_T.sum().clamp(min=1).log()
        return (log_E.exp() * log_E).sum()
