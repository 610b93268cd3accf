"""Softmax top-k selection: Switch (2101.03961, k=1), Mixtral (2401.04088), DeepSeekMoE (2401.06066).

    p = softmax(z)        S = top-k

The literature has four conventions for the combine weights, and they differ in output and gradient:
    softmax_topk_renorm   g = p_S / sum(p_S)     LibMoE, CuMo, Qwen with norm_topk_prob
    softmax_topk          g = p_S                Switch, DeepSeekMoE-16B: the weights sum to less than 1
    topk_softmax          g = softmax(z_S)       Mixtral; equal to the first in exact arithmetic
    double_softmax        g = softmax(p_S)       LibMoE's XMoE: no weight is more than e times another
With k = 1 all but the second give g = 1 for every token, so the router never learns from the task loss.
Shapes: T tokens, E experts, K slots of a token.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from llava_moe.moe.component import check_k
from llava_moe.moe.selectors.base import Selection, Selector
from llava_moe.moe.selectors.schedule import ActiveK
from llava_moe.moe.types import RoutingContext


class _SoftmaxTopK(Selector):
    """What the conventions share.

    Raises:
        ValueError: k is not between 1 and E.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Selector.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
            scheduled_k: whether there is a float32 buffer `active_k`, initially k, which a controller moves. Slots at
                or beyond it are empty, and the others are weighted as if k were `active_k`.
        """

        k: int = 2
        scheduled_k: bool = False

    config: _SoftmaxTopK.Config

    def __init__(self, num_experts: int, config: _SoftmaxTopK.Config) -> None:
        super().__init__(num_experts, config)
        check_k("selector", config.k, num_experts)
        self.schedule = ActiveK(config.k) if config.scheduled_k else None

    @property
    def active_experts(self) -> float:
        return self.config.k

    def forward(self, scores_TE: Tensor, context: RoutingContext) -> Selection:
        probs_TE = scores_TE.softmax(dim=-1)
        top_TK, index_TK = self._ranked(probs_TE).topk(self.config.k, dim=-1)
        off_K = None if self.schedule is None else self.schedule.off_K()
        weight_TK = self._weights(scores_TE, top_TK, index_TK, off_K)
        if off_K is not None:
            index_TK = index_TK.masked_fill(off_K, self.num_experts)
        return Selection(probs_TE, index_TK, weight_TK)

    def _ranked(self, probs_TE: Tensor) -> Tensor:
        """What the k largest are taken of."""
        return probs_TE

    def _weights(self, scores_TE: Tensor, top_TK: Tensor, index_TK: Tensor, off_K: Tensor | None) -> Tensor:
        raise NotImplementedError


def _without(value_TK: Tensor, off_K: Tensor | None, fill: float) -> Tensor:
    return value_TK if off_K is None else value_TK.masked_fill(off_K, fill)


class SoftmaxTopKRenorm(_SoftmaxTopK):
    """Softmax, top-k, and the kept probabilities divided by their sum."""

    def _weights(self, scores_TE: Tensor, top_TK: Tensor, index_TK: Tensor, off_K: Tensor | None) -> Tensor:
        top_TK = _without(top_TK, off_K, 0.0)
        return top_TK / top_TK.sum(dim=-1, keepdim=True)


class SoftmaxTopK(_SoftmaxTopK):
    """Softmax, top-k, and the probabilities as they are."""

    normalised = False

    def _weights(self, scores_TE: Tensor, top_TK: Tensor, index_TK: Tensor, off_K: Tensor | None) -> Tensor:
        return _without(top_TK, off_K, 0.0)


class TopKSoftmax(_SoftmaxTopK):
    """Top-k of the logits, softmax over the kept ones."""

    def _weights(self, scores_TE: Tensor, top_TK: Tensor, index_TK: Tensor, off_K: Tensor | None) -> Tensor:
        return _without(scores_TE.gather(-1, index_TK), off_K, -math.inf).softmax(dim=-1)


class DoubleSoftmax(_SoftmaxTopK):
    """Softmax, top-k, and a second softmax over the kept probabilities.

    With `bias`, one learned number for each expert is added to the probabilities before they are compared and weighted
    (LibMoE's first cosine routers); `probs_TE` is without it.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(_SoftmaxTopK.Config):
        """Options.

        Attributes:
            k, scheduled_k: as for the other conventions.
            bias: whether there is a learned bias on the probabilities (initially zero).
        """

        bias: bool = False

    config: DoubleSoftmax.Config

    def __init__(self, num_experts: int, config: DoubleSoftmax.Config) -> None:
        super().__init__(num_experts, config)
        self.bias = nn.Parameter(torch.zeros(num_experts)) if config.bias else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _ranked(self, probs_TE: Tensor) -> Tensor:
        return probs_TE if self.bias is None else probs_TE + self.bias.float()

    def _weights(self, scores_TE: Tensor, top_TK: Tensor, index_TK: Tensor, off_K: Tensor | None) -> Tensor:
        return _without(top_TK, off_K, -math.inf).softmax(dim=-1)
