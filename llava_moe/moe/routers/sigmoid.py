"""Sigmoid routing: sigma-MoE (Csordas et al., 2310.10837) and LibMoE's renormalised variant (2411.00918).

    s = sigmoid(x W^T)        S = top-k        g = s_S, or s_S / sum(s_S)

The experts do not compete through a softmax. The rows of W start with equal lengths, so that at first only the
direction of a token prefers an expert. Shapes: D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

import torch

from llava_moe.moe.routers.base import Router
from llava_moe.moe.routers.scored import ScoredRouter
from llava_moe.moe.scorers import LinearScorer
from llava_moe.moe.selectors.sigmoid import SigmoidTopK, SigmoidTopKRenorm


class SigmoidRouter(ScoredRouter):
    """A linear scorer and the k largest sigmoids."""

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
            renormalise: whether the weights are divided by their sum (LibMoE); the paper leaves them as they are.
            expert_dropout: in training, the probability that an expert is left out for the whole batch.
            init_std: standard deviation of the initial scorer weights; None takes D ** -0.5.
        """

        k: int = 2
        renormalise: bool = False
        expert_dropout: float = 0.05
        init_std: float | None = None

    config: SigmoidRouter.Config

    def __init__(self, hidden: int, num_experts: int, config: SigmoidRouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        self._equalise_rows()

    def make_scorer(self) -> LinearScorer:
        std = self.hidden**-0.5 if self.config.init_std is None else self.config.init_std
        return LinearScorer(self.hidden, self.num_experts, LinearScorer.Config(init_std=std))

    def make_selector(self) -> SigmoidTopK:
        selector = SigmoidTopKRenorm if self.config.renormalise else SigmoidTopK
        options = selector.Config(k=self.config.k, expert_dropout=self.config.expert_dropout)
        return selector(self.num_experts, options)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        self._equalise_rows()

    @torch.no_grad()
    def _equalise_rows(self) -> None:
        """Brings the rows to one length; the root mean square over the matrix stays."""
        weight = self.scorer.get_parameter("weight")
        tiny = torch.finfo(weight.dtype).tiny  # a matrix of zeros stays one
        rows_E1 = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
        weight.mul_(rows_E1.square().mean().sqrt() / rows_E1.clamp(min=tiny))
