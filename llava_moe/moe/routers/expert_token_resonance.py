"""Expert-token resonance, LocMoE+ (2406.00023): tokens choose experts, then experts choose among those tokens.

    affinity  a_te = cos(x_t, w_e)        w_e = 1 on the e-th slice of the hidden dimensions (`scorers/grap.py`)
    token     its k experts with the largest affinity; g = softmax(a) over all experts, renormalised over the k
    expert    of the tokens that chose it, the C with the largest affinity; the others lose that slot

The paper prints "Bottom-C" and says twice that the expert keeps the highest affinities; so does this. It gives no
formula for g. C = ceil(factor * slots / E), where the buffer `factor` is a knob: large first, then falling to the bound
`capacity_bounds.ec_min_exp`. As any capacity here it acts in training only: in evaluation an answer would depend on its
batch mates. Shapes: T tokens, D hidden width, E experts, K slots of a token.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava_moe.moe.capacity import DROPPED
from llava_moe.moe.component import check_k
from llava_moe.moe.routers.base import Router
from llava_moe.moe.routers.expert_choice import places
from llava_moe.moe.scorers import float32_linear
from llava_moe.moe.scorers.grap import slice_directions
from llava_moe.moe.types import Routing, RoutingContext


class ExpertTokenResonanceRouter(Router):
    """The intersection of both choices; nothing is learned. The extra `dropped_T` counts the slots a token lost.

    Buffers: `factor`, the knob; `directions` (E, D), the unit vectors w_e / |w_e|, which never change.
    """

    token_choice = False
    causal_safe = False
    normalised = False
    learned = False
    extras = (DROPPED,)
    float32_buffers: ClassVar[tuple[str, ...]] = ("factor", "directions")

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: experts that a token chooses (the paper's l), 1..E.
            factor: initial capacity of an expert over the mean number of tokens that choose one.
        """

        k: int = 1
        factor: float = 1.1

    config: ExpertTokenResonanceRouter.Config

    def __init__(self, hidden: int, num_experts: int, config: ExpertTokenResonanceRouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        check_k("expert_token_resonance router", config.k, num_experts)
        if config.factor <= 0:
            raise ValueError(f"expert_token_resonance router: factor={config.factor} must be above 0")
        self.register_buffer("directions", slice_directions(hidden, num_experts, power=0.5))
        self.register_buffer("factor", torch.tensor(config.factor, dtype=torch.float32))
        self.factor: Tensor
        self.directions: Tensor

    @property
    def active_experts(self) -> float:
        return self.config.k

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """There is nothing to draw."""

    def affinity(self, x_TD: Tensor) -> Tensor:
        """float32 cosine of every token with every expert's direction, (T, E)."""
        return float32_linear(nn.functional.normalize(x_TD.float(), dim=-1), self.directions)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        affinity_TE = self.affinity(x_TD)
        probs_TE = affinity_TE.softmax(dim=-1)
        index_TK = affinity_TE.argsort(dim=-1, descending=True, stable=True)[:, : self.config.k]
        weight_TK = probs_TE.gather(-1, index_TK)
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        dropped_T = torch.zeros_like(context.sequence_T)
        if self.training:
            kept_TK = self._kept(affinity_TE.detach(), index_TK, context.token_mask_T)
            dropped_T = (~kept_TK & context.token_mask_T.unsqueeze(-1)).sum(-1)
            index_TK = index_TK.masked_fill(~kept_TK, self.num_experts)
            weight_TK = weight_TK.masked_fill(~kept_TK, 0.0)
        return Routing(affinity_TE, probs_TE, index_TK, weight_TK, {DROPPED: dropped_T})

    def _kept(self, affinity_TE: Tensor, index_TK: Tensor, mask_T: Tensor) -> Tensor:
        """Which of the tokens' choices their experts accept, (T, K); padding is never accepted."""
        chose_TE = torch.zeros_like(affinity_TE, dtype=torch.bool).scatter(1, index_TK, True) & mask_T.unsqueeze(-1)
        place_TE = places(affinity_TE.masked_fill(~chose_TE, -2.0), torch.zeros_like(index_TK[:, 0]))
        limit = (self.factor.float() * chose_TE.sum() / self.num_experts).ceil()
        return (chose_TE & (place_TE < limit)).gather(1, index_TK)
