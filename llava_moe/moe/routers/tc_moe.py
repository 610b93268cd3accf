"""TC-MoE (ICLR 2025): an expert space of +E, -E and null, so that a token may subtract an expert or use none.

    z = x W^T, (2E + k): E positive | E negative, offset -1 | k null, offset -10          p = softmax(z)
    S = the k best of all        n = sum of p over the experts in S + sum of p over all nulls
    y = sum over S of +-(p_e / n) E_e(x)                 a null adds nothing

`Routing` speaks of the E real experts: +e and -e are one expert, so their probabilities are added up and their logits
joined by logaddexp, as the method's balance loss wants; null slots are empty. Where a token chose both signs of an
expert it runs once, with the difference as weight, and counts once. The released inference code overwrites the minus
sign; this does not. Shapes: T tokens, D hidden width, E experts, K = k slots.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from llava_moe.moe.component import check_k
from llava_moe.moe.routers.base import Router
from llava_moe.moe.scorers import float32_linear
from llava_moe.moe.types import Routing, RoutingContext


class TCMoERouter(Router):
    """Signed weights (ICLR 2025). The extra `null_prob_T` is the probability of all nulls together."""

    normalised = False
    signed = True
    extras = ("null_prob_T",)

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: slots of a token, 1..E, and number of nulls: a token may be left without any expert.
            negative_offset, null_offset: constants added to the logits of negatives and nulls.
            init_std: standard deviation of the initial weights.
        """

        k: int = 2
        negative_offset: float = -1.0
        null_offset: float = -10.0
        init_std: float = 0.006

    config: TCMoERouter.Config

    def __init__(self, hidden: int, num_experts: int, config: TCMoERouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        check_k("tc_moe router", config.k, num_experts)
        self.weight = nn.Parameter(torch.empty(2 * num_experts + config.k, hidden))
        self.reset_parameters()

    @property
    def active_experts(self) -> float:
        return self.config.k

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.weight, std=self.config.init_std, generator=generator)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        num_experts, k = self.num_experts, self.config.k
        positive_TE, negative_TE, null_TK = float32_linear(x_TD, self.weight).split([num_experts, num_experts, k], -1)
        negative_TE, null_TK = negative_TE + self.config.negative_offset, null_TK + self.config.null_offset
        scores_TA = torch.cat([positive_TE, negative_TE, null_TK], dim=-1)
        all_TA = scores_TA.softmax(dim=-1)
        null_prob_T = all_TA[:, 2 * num_experts :].sum(dim=-1)
        choice_TK = scores_TA.topk(k, dim=-1).indices
        is_null_TK = choice_TK >= 2 * num_experts
        used_TK = all_TA.gather(-1, choice_TK).masked_fill(is_null_TK, 0.0)
        share_TK = used_TK / (used_TK.sum(dim=-1) + null_prob_T).unsqueeze(-1)
        weight_TK = torch.where(choice_TK < num_experts, share_TK, -share_TK)
        index_TK = (choice_TK % num_experts).masked_fill(is_null_TK, num_experts)
        index_TK, weight_TK = _merge(index_TK, weight_TK, num_experts)
        probs_TE = all_TA[:, :num_experts] + all_TA[:, num_experts : 2 * num_experts]
        logits_TE = torch.logaddexp(positive_TE, negative_TE)
        return Routing(logits_TE, probs_TE, index_TK, weight_TK, {"null_prob_T": null_prob_T})


def _merge(index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Adds up slots of the same expert in the first of them and empties the others; empty slots get the weight 0."""
    same_TKK = (index_TK.unsqueeze(2) == index_TK.unsqueeze(1)) & (index_TK < num_experts).unsqueeze(2)
    total_TK = (same_TKK * weight_TK.unsqueeze(1)).sum(dim=-1)
    again_TK = same_TKK.tril(diagonal=-1).any(dim=-1)
    index_TK = index_TK.masked_fill(again_TK, num_experts)
    return index_TK, total_TK.masked_fill(again_TK | (index_TK == num_experts), 0.0)
