"""One MoE layer: route, run the experts, add what always runs, record. Shapes: T tokens, D hidden width."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from llava_moe.moe.capacity import Capacity
from llava_moe.moe.experts import Experts
from llava_moe.moe.experts.shared import SharedExperts
from llava_moe.moe.routers import Router
from llava_moe.moe.scope import RoutingScope


class MoELayer(nn.Module):
    """Takes the place of a dense feed-forward block: hidden states in, hidden states of the same shape out.

    Args:
        router: decides which experts see which tokens; built for `experts.num_experts` experts.
        experts: the routed experts.
        layer: index of the layer in its part of the model.
        scope: where contexts come from and routings go to; one for the whole model.
        part: "decoder", "vision" or "projector".
        shared: experts that see every token.
        capacity: a bound on the tokens of an expert; None is dropless. It acts in training only: a dropped token
            would make an answer depend on the other questions of its batch.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        layer: int = 0,
        scope: RoutingScope | None = None,
        part: str = "decoder",
        shared: SharedExperts | None = None,
        capacity: Capacity | None = None,
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(f"the router knows {router.num_experts} experts, but there are {experts.num_experts}")
        self.router = router
        self.experts = experts
        self.shared = shared
        self.capacity = capacity
        self.site = (part, layer)
        self.scope = scope if scope is not None else RoutingScope()
        router.check_part(part)
        if capacity is not None:
            capacity.check(router)
        router.attach(experts)
        self.side = router.side_branch(experts.spec)

    @property
    def causal_safe(self) -> bool:
        """Whether a token's output never depends on later tokens."""
        return self.router.causal_safe

    @property
    def layer(self) -> int:
        return self.site[1]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps (..., D) to (..., D), or to the output width of the experts where that is another."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        context = self.scope.context(self.site, hidden_states.shape, x_TD.device)
        if self.router.needs_experts:
            context = replace(context, run_experts=self.experts.every)
        routing = self.router(x_TD, context)
        if self.capacity is not None and self.training:
            routing = self.capacity(routing, context)
        y_TD = self.experts(x_TD, routing.index_TK, routing.weight_TK)
        if self.shared is not None:
            y_TD = self.shared(x_TD, y_TD)
        if self.side is not None:
            y_TD = y_TD + self.side(x_TD, routing).to(y_TD.dtype)
        self.scope.record(self.site, routing, context, keep=self.router.needs_previous)
        return y_TD.reshape(*hidden_states.shape[:-1], y_TD.shape[-1])
