"""Dense-to-sparse gate (EvoMoE, Nie et al., 2112.14397): dense at first, sparse as a Gumbel softmax is annealed.

    G = softmax((x W^T + gumbel) / temperature)        S = {e : G_e > threshold}        g = G_S        in training
    q = softmax(x W^T / temperature)                   S = top-k                        g = q_S        in evaluation

The controller temperature anneals the buffer `selector.temperature`. Shapes: D hidden width, E experts.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.routers.base import Router
from llava_moe.moe.routers.scored import ScoredRouter
from llava_moe.moe.scorers import LinearScorer
from llava_moe.moe.selectors.dts import DenseToSparse


class DtsRouter(ScoredRouter):
    """A linear scorer and the dense-to-sparse selector."""

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: experts of a token in evaluation; training decides by itself.
            temperature: the initial one; the authors' scripts anneal 2.0 to 0.3.
            threshold: least Gumbel softmax of a chosen expert.
            gumbel_weights: whether the training weights carry the noise; otherwise they are softmax(z).
            hard_at: temperature at and below which a token takes one expert with weight 1; None never does.
            init_std: standard deviation of the initial scorer weights.
        """

        k: int = 1
        temperature: float = 2.0
        threshold: float = 1e-3
        gumbel_weights: bool = True
        hard_at: float | None = None
        init_std: float = 0.02

    config: DtsRouter.Config

    def make_scorer(self) -> LinearScorer:
        return LinearScorer(self.hidden, self.num_experts, LinearScorer.Config(init_std=self.config.init_std))

    def make_selector(self) -> DenseToSparse:
        config = self.config
        options = DenseToSparse.Config(
            k=config.k,
            temperature=config.temperature,
            threshold=config.threshold,
            gumbel_weights=config.gumbel_weights,
            hard_at=config.hard_at,
        )
        return DenseToSparse(self.num_experts, options)
