"""The heterogeneous balance loss of MoE++ (2410.07348), for experts that differ in cost.

    L = sum_e eta_e f_e P_e      eta = 1 for feed-forward experts, tau for those without computation

A smaller tau makes a slot of a zero, copy or constant expert cheaper, so more tokens go there. With tau = 1 it is the
Switch loss over E. Needs the extra `zero_compute_E`, bool of shape (E,), of the router `moe_plus_plus`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from llava_moe.moe.losses.base import BalanceLoss, masked_mean, shares
from llava_moe.moe.types import Routing, RoutingContext

CHEAP = "zero_compute_E"


class Heterogeneous(BalanceLoss):
    """Switch with a weight for each kind of expert, and without the factor E."""

    requires: ClassVar[tuple[str, ...]] = (CHEAP,)
    provided_by: ClassVar[tuple[str, ...]] = ("moe_plus_plus",)

    @dataclasses.dataclass(frozen=True)
    class Config(BalanceLoss.Config):
        """Options.

        Attributes:
            tau: weight of the experts without computation, above 0 and at most 1.
        """

        tau: float = 0.75

    config: Heterogeneous.Config

    def __init__(self, config: Heterogeneous.Config | None = None) -> None:
        super().__init__(config)
        if not 0 < self.config.tau <= 1:
            raise ValueError(f"heterogeneous: tau={self.config.tau} must be above 0 and at most 1")

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        share_E = shares(routing.load_E(context.token_mask_T).detach())
        prob_E = masked_mean(routing.probs_TE, context.token_mask_T)
        eta_E = torch.where(routing.extra(CHEAP), self.config.tau, 1.0)
        return (eta_E * share_E * prob_E).sum()
