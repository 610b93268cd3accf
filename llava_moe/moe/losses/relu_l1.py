"""The sparsity loss of ReMoE (2412.14711): an L1 norm of the ReLU gates, weighted by load.

    load-weighted   L = E / (k T^2) * sum_e (sum_t g_te) c_e      c_e = number of tokens with an open gate
    plain           L = 1 / (T E) * sum_te g_te

The first is the Switch formula with gates in the place of probabilities: hot experts pay more. Its coefficient lambda
is moved by the controller `remoe_lambda`; give the loss itself the coefficient 1 then. Only open gates have a gradient.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from llava_moe.moe.losses.base import BalanceLoss
from llava_moe.moe.types import Routing, RoutingContext


class ReluL1(BalanceLoss):
    """Sum of the combine weights, scaled; for the router `remoe`."""

    @dataclasses.dataclass(frozen=True)
    class Config(BalanceLoss.Config):
        """Options.

        Attributes:
            k: open gates of a token that training aims at; used by the load-weighted form.
            load_weighted: weight every expert's gates by its load; false is the plain L1 norm.
        """

        k: int = 1
        load_weighted: bool = True

    config: ReluL1.Config

    def __init__(self, config: ReluL1.Config | None = None) -> None:
        super().__init__(config)
        if self.config.k < 1:
            raise ValueError(f"relu_l1: k={self.config.k} must be at least 1")

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        mask_T = context.token_mask_T
        gate_E = (routing.gates_TE() * mask_T.unsqueeze(-1)).sum(dim=0)
        num_tokens, num_experts = mask_T.sum().clamp(min=1), routing.num_experts
        if not self.config.load_weighted:
            return gate_E.sum() / (num_tokens * num_experts)
        # One division by T after the other: T^2 leaves the range in which float32 counts exactly.
        load_E = routing.load_E(mask_T).detach() / num_tokens
        return num_experts / self.config.k * (gate_E / num_tokens * load_E).sum()
