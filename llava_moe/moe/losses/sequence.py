"""The sequence-wise balance loss of DeepSeekMoE (2401.06066), DeepSeek-V2 (2405.04434) and V3 (2412.19437, eq. 17-20).

    L = mean over sequences of  E * sum_e f_e P_e      f, P within one sequence

With one sequence it is the Switch loss. It keeps every single sequence balanced, which matters where sequences are
served one by one; Switch lets one sequence make up for another. V3 divides sigmoid scores by their sum over the experts
before it takes the mean: `scores: sigmoid`. Shapes: S sequences (at most as many as tokens), T tokens, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from llava_moe.moe.losses.base import BalanceLoss
from llava_moe.moe.types import Routing, RoutingContext
from llava_moe.registry import near_misses

SCORES = ("probs", "sigmoid")


class Sequence(BalanceLoss):
    """The Switch loss of each sequence, averaged over the sequences that have a token."""

    scope: ClassVar[str] = "sequence"

    @dataclasses.dataclass(frozen=True)
    class Config(BalanceLoss.Config):
        """Options.

        Attributes:
            scores: what P is the mean of: "probs", the router's probabilities; or "sigmoid", the sigmoid of the
                logits over its sum (DeepSeek-V3).
        """

        scores: str = "probs"

    config: Sequence.Config

    def __init__(self, config: Sequence.Config | None = None) -> None:
        super().__init__(config)
        chosen = self.config.scores
        if chosen not in SCORES:
            raise ValueError(f"sequence: unknown scores={chosen!r}; {near_misses(chosen, list(SCORES))}")

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        """`context.sequence_T` must hold numbers below T, as rows of a batch do."""
        num_experts, num_tokens = routing.num_experts, routing.num_tokens
        score_TE = routing.probs_TE
        if self.config.scores == "sigmoid":
            score_TE = routing.logits_TE.sigmoid()
            score_TE = score_TE / score_TE.sum(dim=-1, keepdim=True)
        mask_T, sequence_T = context.token_mask_T.to(score_TE.dtype), context.sequence_T
        # A table with a row for each possible sequence: how many there really are is not known on the host.
        score_SE = torch.zeros_like(score_TE).index_add(0, sequence_T, score_TE * mask_T.unsqueeze(-1))
        tokens_S = torch.zeros_like(mask_T).index_add(0, sequence_T, mask_T)
        bins = torch.zeros(num_tokens * (num_experts + 1), dtype=score_TE.dtype, device=score_TE.device)
        slot_TK = sequence_T.unsqueeze(-1) * (num_experts + 1) + routing.index_TK
        bins.scatter_add_(0, slot_TK.reshape(-1), mask_T.unsqueeze(-1).expand_as(slot_TK).reshape(-1))
        load_SE = bins.reshape(num_tokens, num_experts + 1)[:, :num_experts]
        share_SE = load_SE / load_SE.sum(dim=-1, keepdim=True).clamp(min=1)
        mean_SE = score_SE / tokens_S.clamp(min=1).unsqueeze(-1)
        loss_S = num_experts * (share_SE * mean_SE).sum(dim=-1)
        return loss_S.sum() / (tokens_S > 0).sum().clamp(min=1)
