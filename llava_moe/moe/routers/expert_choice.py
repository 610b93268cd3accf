"""Expert choice (Zhou et al., 2202.09368): each expert takes its best tokens, so the load is balanced by construction.

    p = softmax(z)        expert e takes the C tokens of the group with the largest p_te        g_te = p_te
    C = ceil(capacity_factor * real tokens of the group / E), at most all of them

A token is taken by 0..E experts, so it has K = E slots, slot e for expert e. What a token gets depends on the others of
its group, later ones included: not for causal decoders. Shapes: T tokens, D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llava_moe.moe.routers.base import Router
from llava_moe.moe.scorers import LinearScorer
from llava_moe.moe.types import Routing, RoutingContext
from llava_moe.registry import near_misses

GROUPS = ("sequence", "batch")


class ExpertChoiceRouter(Router):
    """Experts choose tokens; padding is never chosen."""

    token_choice = False
    causal_safe = False
    normalised = False

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            capacity_factor: mean number of experts of a token; 2 compares to top-2.
            group: among which tokens an expert chooses: "sequence" those of one sequence or picture, so that an answer
                does not depend on its batch mates; "batch" all of this rank's micro-batch.
            renormalise: divides the weights of a token by their sum (a token that nobody takes keeps 0), with which
                copied experts start close to the dense block (2212.05055 does so for vision towers).
            init_std: standard deviation of the initial scorer weights.
        """

        capacity_factor: float = 2.0
        group: str = "sequence"
        renormalise: bool = False
        init_std: float = 0.02

    config: ExpertChoiceRouter.Config

    def __init__(self, hidden: int, num_experts: int, config: ExpertChoiceRouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        if config.capacity_factor <= 0:
            raise ValueError(f"expert_choice router: capacity_factor={config.capacity_factor} must be above 0")
        if config.group not in GROUPS:
            hint = near_misses(config.group, list(GROUPS))
            raise ValueError(f"expert_choice router: unknown group {config.group!r}; {hint}")
        self.scorer = LinearScorer(hidden, num_experts, LinearScorer.Config(init_std=config.init_std))

    @property
    def active_experts(self) -> float:
        return min(self.config.capacity_factor, float(self.num_experts))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.scorer.reset_parameters(generator)

    def tie_rows(self, group: int) -> None:
        self.scorer.tie_rows(group)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TE = self.scorer(x_TD, context).logits_TE
        probs_TE = logits_TE.softmax(dim=-1)
        mask_T = context.token_mask_T
        whole = self.config.group == "batch"
        group_T = torch.zeros_like(context.sequence_T) if whole else context.sequence_T
        place_TE = places(probs_TE.detach().masked_fill(~mask_T.unsqueeze(-1), -1.0), group_T)
        share = self.config.capacity_factor / self.num_experts
        # The small term keeps a product that should be whole from being rounded up.
        limit_T = (group_sizes(group_T, mask_T).double() * share - 1e-9).ceil()
        chosen_TE = (place_TE < limit_T.unsqueeze(-1)) & mask_T.unsqueeze(-1)
        weight_TE = probs_TE.masked_fill(~chosen_TE, 0.0)
        if self.config.renormalise:
            weight_TE = weight_TE / weight_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        experts_E = torch.arange(self.num_experts, device=x_TD.device)
        return Routing(logits_TE, probs_TE, torch.where(chosen_TE, experts_E, self.num_experts), weight_TE)


def places(score_TE: Tensor, group_T: Tensor) -> Tensor:
    """Place of every token in every expert's queue among the tokens of its group: 0 for the highest score.

    Equal scores keep the order of the tokens. Sorts on the device; the host need not know the groups.
    """
    group_T = group_T.contiguous()
    by_score_TE = score_TE.argsort(dim=0, descending=True, stable=True)
    by_group_TE = group_T[by_score_TE].argsort(dim=0, stable=True)
    order_TE = by_score_TE.gather(0, by_group_TE)
    start_T = torch.searchsorted(group_T.sort().values, group_T)
    row_T1 = torch.arange(group_T.shape[0], device=group_T.device).unsqueeze(-1)
    return torch.empty_like(order_TE).scatter_(0, order_TE, row_T1 - start_T[order_TE])


def group_sizes(group_T: Tensor, mask_T: Tensor) -> Tensor:
    """For every token the number of tokens of its group that the mask admits."""
    group_T = group_T.contiguous()
    sorted_T, order_T = group_T.sort()
    admitted = torch.nn.functional.pad(mask_T[order_T].cumsum(0), (1, 0))
    first_T, end_T = torch.searchsorted(sorted_T, group_T), torch.searchsorted(sorted_T, group_T, right=True)
    return admitted[end_T] - admitted[first_T]
