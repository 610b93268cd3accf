"""Random routing: k random experts with equal weights; the bound from below that learned routers are compared with.

    training      S = k distinct experts, drawn anew for each token         g = 1 / k
    evaluation    S = top-k of cos(FREQUENCY * R x / |x|), R fixed            g = 1 / k

In evaluation the choice depends on the direction of the token's hidden state and on nothing else, so an answer does
not depend on its batch mates. The cosine of a phase of many turns spreads also such tokens that lie close together,
and still gives equal experts to hidden states that differ by rounding only.
Shapes: T tokens, D hidden width, E experts, K slots of a token.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_moe.moe.component import check_k
from llava_moe.moe.routers.base import Router
from llava_moe.moe.scorers import float32_linear
from llava_moe.moe.types import Routing, RoutingContext

# Standard deviation of the phase in radians: a few turns.
FREQUENCY = 16.0


class RandomRouter(Router):
    """Nothing is learned; `logits_TE` is 0 and `probs_TE` is 1 / E.

    Raises:
        ValueError: k is not between 1 and E.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
        """

        k: int = 2

    config: RandomRouter.Config
    stochastic = True
    learned = False
    projection_ED: Tensor

    def __init__(self, hidden: int, num_experts: int, config: RandomRouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        check_k("random router", config.k, num_experts)
        self.register_buffer("projection_ED", torch.empty(num_experts, hidden))
        self.reset_parameters()

    @property
    def active_experts(self) -> float:
        return self.config.k

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.projection_ED, generator=generator)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        num_tokens, k = x_TD.shape[0], self.config.k
        if self.training:
            draw_TE = torch.rand(num_tokens, self.num_experts, dtype=torch.float32, device=x_TD.device)
        else:
            draw_TE = self._phase(x_TD.detach()).cos()
        index_TK = draw_TE.topk(k, dim=-1).indices
        zeros_TE = torch.zeros_like(draw_TE)
        weight_TK = torch.full_like(index_TK, 1 / k, dtype=torch.float32)
        return Routing(zeros_TE, zeros_TE + 1 / self.num_experts, index_TK, weight_TK)

    def _phase(self, x_TD: Tensor) -> Tensor:
        return FREQUENCY * float32_linear(F.normalize(x_TD.float(), dim=-1), self.projection_ED)
