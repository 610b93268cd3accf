"""The balance loss of GShard (2006.16668, algorithm 1), CuMo (2405.05949), EvoMoE (2112.14397) and LibMoE (2411.00918).

    L = E^2 * mean_e(f1_e P_e)      f1_e = share of the tokens whose best slot is expert e      P_e = mean probability

Only the best slot of a token is counted, the one with the largest weight (by size: a method may subtract experts), and
the first of them where several are equal. It is 1 for a uniform router and E for one that sends every token's best slot
to one expert with probability 1. Tokens without a filled slot have no share. LibMoE computes it for each sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_moe.moe.losses.base import BalanceLoss, masked_mean, shares
from llava_moe.moe.types import Routing, RoutingContext


class GShard(BalanceLoss):
    """As Switch, but the load counts each token's best slot alone."""

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        load_E = best_slots(routing).load_E(context.token_mask_T)
        prob_E = masked_mean(routing.probs_TE, context.token_mask_T)
        return routing.num_experts * (shares(load_E) * prob_E).sum()


def best_slots(routing: Routing) -> Routing:
    """The routing without gradients and with all slots but each token's best one emptied."""
    routing = routing.detach()
    filled_TK = routing.index_TK < routing.num_experts
    size_TK = routing.weight_TK.abs().masked_fill(~filled_TK, -1.0)
    largest_TK = size_TK == size_TK.amax(dim=-1, keepdim=True)
    best_TK = largest_TK & (largest_TK.cumsum(dim=-1) == 1)
    index_TK = torch.where(best_TK, routing.index_TK, routing.num_experts)
    return Routing(routing.logits_TE, routing.probs_TE, index_TK, routing.weight_TK)
