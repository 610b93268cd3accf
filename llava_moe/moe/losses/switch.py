"""The load-balancing loss of Switch Transformers (2101.03961, eq. 4-6), for any k.

    L = E * sum_e f_e P_e      f_e = share of the filled slots      P_e = mean probability

It is 1 for a uniform router, and E when one expert takes everything. f is a count, so the gradient flows through P.
Statistics are those of the micro-batch on one rank; tokens of padding do not count.
"""

from __future__ import annotations

from torch import Tensor

from llava_moe.moe.losses.base import masked_mean
from llava_moe.moe.types import Routing, RoutingContext


def switch(routing: Routing, context: RoutingContext) -> Tensor:
    load_E = routing.load_E(context.token_mask_T).detach()
    share_E = load_E / load_E.sum().clamp(min=1)
    prob_E = masked_mean(routing.probs_TE, context.token_mask_T)
    return routing.num_experts * (share_E * prob_E).sum()
