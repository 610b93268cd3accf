"""LocMoE (2401.13920): top-1 by fixed, orthogonal expert directions (`scorers/grap.py`).

    z = relu(mean of each slice of x)        p = softmax(z)        the best expert, weight p

The locality loss of the paper is a balance loss (`locality`), its capacity bound is in `capacity_bounds.py`.
Shapes: T tokens, D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llava_moe.moe.routers.base import Router
from llava_moe.moe.scorers.grap import GrapScorer
from llava_moe.moe.types import Routing, RoutingContext


class LocMoERouter(Router):
    """One expert for each token; without a bias it has no parameter."""

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            bias: whether the scorer learns a bias.
            renormalise: weight 1 for the chosen expert in place of its probability, so that experts that are copies
                of a dense block equal it; the router then gets no gradient from the task loss.
        """

        bias: bool = False
        renormalise: bool = False

    config: LocMoERouter.Config

    def __init__(self, hidden: int, num_experts: int, config: LocMoERouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        self.scorer = GrapScorer(hidden, num_experts, GrapScorer.Config(bias=config.bias))
        self.learned = config.bias
        self.normalised = config.renormalise

    @property
    def active_experts(self) -> float:
        return 1

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.scorer.reset_parameters(generator)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TE = self.scorer(x_TD, context).logits_TE
        probs_TE = logits_TE.softmax(dim=-1)
        # Tokens whose slice means are all negative tie at 0: argmax gives them the first expert, topk any of them.
        index_T1 = logits_TE.argmax(dim=-1, keepdim=True)
        weight_T1 = probs_TE.gather(-1, index_T1)
        if self.config.renormalise:
            weight_T1 = torch.ones_like(weight_T1)
        return Routing(logits_TE, probs_TE, index_T1, weight_T1)
