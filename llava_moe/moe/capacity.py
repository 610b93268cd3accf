"""A bound on the number of tokens of one expert (GShard 2006.16668, Switch 2101.03961), with drop statistics.

    C = ceil(factor * filled slots / E)
    C_e = ceil(factor * filled slots * eta_e / sum(eta))      with `tau`: eta is tau for feed-forward experts and 1 for
                                                              those without computation (MoE++ 2410.07348)

Slots beyond C become empty (index E, weight 0). The weights of the slots that stay are not raised. What the router had
chosen is kept in the extras: `Routing.before_drops` gives it to the balance losses.
In training the second choices of a token may give way to the first ones of later tokens, as in GShard, and with the
policy "weight" any slot to a later one; evaluation drops nothing.
Shapes: T tokens, E experts, K slots of a token, S = T x K slots.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava_moe.moe.component import Component, Float32Buffers
from llava_moe.moe.types import CHOSEN, CHOSEN_WEIGHT, Routing, RoutingContext
from llava_moe.registry import near_misses

if TYPE_CHECKING:
    from llava_moe.moe.routers import Router

POLICIES = ("position", "weight")
DROPPED = "dropped_T"
ZERO_COMPUTE = "zero_compute_E"


class Capacity(Float32Buffers, Component):
    """Empties the slots that do not fit, and reports how many each token lost as the extra `dropped_T`."""

    kind: ClassVar[str] = "capacity"
    float32_buffers: ClassVar[tuple[str, ...]] = ("factor",)

    @dataclasses.dataclass(frozen=True)
    class Config(Component.Config):
        """Options.

        Attributes:
            factor: capacity over the mean load of an expert; below 1 some slots are always dropped.
            policy: who stays: "position" the first tokens of the batch (Switch), "weight" the largest combine weights.
            tau: capacity of a feed-forward expert over that of one without computation, above 0; null gives all the
                same. For the router moe_plus_plus, whose paper has 0.75.
        """

        factor: float = 1.25
        policy: str = "position"
        tau: float | None = None

    def __init__(self, config: Capacity.Config) -> None:
        super().__init__()
        if config.factor <= 0:
            raise ValueError(f"capacity: factor={config.factor} must be above 0")
        if config.policy not in POLICIES:
            raise ValueError(
                f"capacity: unknown policy {config.policy!r}; {near_misses(config.policy, list(POLICIES))}"
            )
        if config.tau is not None and not config.tau > 0:
            raise ValueError(f"capacity: tau={config.tau} must be above 0, or null")
        self.config = config
        # A buffer, so that a controller can move it and the checkpoint keeps it.
        self.register_buffer("factor", torch.tensor(config.factor, dtype=torch.float32))
        self.factor: Tensor

    def check(self, router: Router) -> None:
        """Called once by the layer.

        Raises:
            ValueError: `tau` tells kinds of experts apart that this router does not.
        """
        if self.config.tau is not None and ZERO_COMPUTE not in router.extras:
            raise ValueError(
                f"capacity: tau={self.config.tau} is for experts with and without computation, which "
                f"{type(router).__name__} does not tell apart; use the router moe_plus_plus, or tau: null"
            )

    def forward(self, routing: Routing, context: RoutingContext) -> Routing:
        """Tokens of padding take no place."""
        num_experts = routing.num_experts
        real_TK = (routing.index_TK < num_experts) & context.token_mask_T.unsqueeze(-1)
        kept_TK = real_TK & (self._rank(routing, real_TK) < self._limit(routing, real_TK))
        dropped_TK = real_TK & ~kept_TK
        # A router that drops slots itself has counted them already.
        dropped_T = routing.extras.get(DROPPED, 0) + dropped_TK.sum(-1)
        return dataclasses.replace(
            routing,
            index_TK=routing.index_TK.masked_fill(dropped_TK, num_experts),
            weight_TK=routing.weight_TK.masked_fill(dropped_TK, 0.0),
            extras={
                **routing.extras,
                DROPPED: dropped_T,
                CHOSEN: routing.index_TK,
                CHOSEN_WEIGHT: routing.weight_TK,
            },
        )

    def _limit(self, routing: Routing, real_TK: Tensor) -> Tensor:
        """The capacity of the expert of each slot; a scalar where all have the same."""
        total = self.factor.float() * real_TK.sum()
        if self.config.tau is None:
            return (total / routing.num_experts).ceil()
        eta_E = torch.where(routing.extra(ZERO_COMPUTE), 1.0, self.config.tau)
        return pad((total * eta_E / eta_E.sum()).ceil(), (0, 1))[routing.index_TK]

    def _rank(self, routing: Routing, real_TK: Tensor) -> Tensor:
        """The place of each slot in its expert's queue, (T, K), from 0."""
        num_experts, shape = routing.num_experts, routing.index_TK.shape
        expert_S = torch.where(real_TK, routing.index_TK, num_experts).reshape(-1)
        if self.config.policy == "weight":
            # By size: a method may subtract experts.
            first = routing.weight_TK.detach().abs().reshape(-1).argsort(descending=True, stable=True)
        else:
            # Every token's best slot comes before any token's second one, as in GShard.
            first = torch.arange(expert_S.numel(), device=expert_S.device).reshape(shape).t().reshape(-1)
        order_S = first[expert_S[first].argsort(stable=True)]
        counts = torch.zeros(num_experts + 2, dtype=torch.int64, device=expert_S.device)
        starts = counts.scatter_add_(0, expert_S + 1, torch.ones_like(expert_S)).cumsum(0)
        place_S = torch.arange(expert_S.numel(), device=expert_S.device) - starts[expert_S[order_S]]
        return torch.empty_like(place_S).scatter_(0, order_S, place_S).reshape(shape)
