"""ReLU selection (ReMoE, 2412.14711): an expert is used where its gate is positive, so the number of experts varies.

    g = ReLU(z)        S = {e : g_e > 0}

The gate is continuous where an expert switches on, so routing is differentiable everywhere. Sparsity comes from
outside: the loss relu_l1 and the controller remoe_lambda. `probs_TE` is g itself. A token may use no expert.
Shapes: T tokens, E experts, K = E slots of a token.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from llava_moe.moe.component import check_k
from llava_moe.moe.selectors.base import Selection, Selector
from llava_moe.moe.types import RoutingContext


class ReLUSelector(Selector):
    """Every expert with a positive score, weighted by it.

    Raises:
        ValueError: k is not between 1 and E.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Selector.Config):
        """Options.

        Attributes:
            k: experts of a token in the mean, which training is regulated to; `active_experts` reports it.
        """

        k: int = 1

    config: ReLUSelector.Config
    normalised = False

    def __init__(self, num_experts: int, config: ReLUSelector.Config) -> None:
        super().__init__(num_experts, config)
        check_k("selector relu", config.k, num_experts)

    @property
    def active_experts(self) -> float:
        return self.config.k

    def forward(self, scores_TE: Tensor, context: RoutingContext) -> Selection:
        gates_TE = scores_TE.relu()
        weight_TK, index_TK = gates_TE.sort(dim=-1, descending=True)
        return Selection(gates_TE, index_TK.masked_fill(weight_TK <= 0, self.num_experts), weight_TK)
