"""One MoE layer: route, run the experts, record."""

from __future__ import annotations

from torch import Tensor, nn

from llava_moe.moe.experts import Experts
from llava_moe.moe.routers import Router
from llava_moe.moe.scope import RoutingScope


class MoELayer(nn.Module):
    """Takes the place of a dense feed-forward block: hidden states in, hidden states of the same shape out."""

    def __init__(self, router: Router, experts: Experts, layer: int = 0, scope: RoutingScope | None = None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.layer = layer
        self.scope = scope if scope is not None else RoutingScope()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps (..., D) to (..., D)."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        context = self.scope.context(self.layer, x_TD.shape[0], x_TD.device)
        routing = self.router(x_TD, context)
        y_TD = self.experts(x_TD, routing.index_TK, routing.weight_TK)
        self.scope.record(self.layer, routing)
        return y_TD.reshape(hidden_states.shape)
