"""The load-balancing loss of Switch Transformers (2101.03961, eq. 4-6), for any k.

    L = E * sum_e f_e P_e      f_e = share of the filled slots      P_e = mean probability

It is 1 for a uniform router, and E when one expert takes everything. f is a count, so the gradient flows through P.
With `per: token` f_e is the load over the tokens instead, as in transformers' Mixtral and Qwen: the value is k times
as large. Statistics are those of the micro-batch on one rank; tokens of padding do not count.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from llava_moe.moe.losses.base import BalanceLoss, masked_mean
from llava_moe.moe.types import Routing, RoutingContext
from llava_moe.registry import near_misses

UNITS = ("slot", "token")


class Switch(BalanceLoss):
    """E * sum of share times mean probability."""

    @dataclasses.dataclass(frozen=True)
    class Config(BalanceLoss.Config):
        """Options.

        Attributes:
            per: what the load is divided by: "slot", the filled slots; or "token", the tokens.
        """

        per: str = "slot"

    config: Switch.Config

    def __init__(self, config: Switch.Config | None = None) -> None:
        super().__init__(config)
        if self.config.per not in UNITS:
            raise ValueError(f"switch: unknown per={self.config.per!r}; {near_misses(self.config.per, list(UNITS))}")

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        load_E = routing.load_E(context.token_mask_T).detach()
        total = load_E.sum() if self.config.per == "slot" else context.token_mask_T.sum()
        share_E = load_E / total.clamp(min=1)
        prob_E = masked_mean(routing.probs_TE, context.token_mask_T)
        return routing.num_experts * (share_E * prob_E).sum()
