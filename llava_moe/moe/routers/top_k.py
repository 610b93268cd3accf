"""Softmax top-k routing: Switch (2101.03961, k=1), Mixtral (2401.04088), DeepSeekMoE (2401.06066).

    z = x W^T (+ b)        p = softmax(z)        S = top-k        g = p_S / sum(p_S), p_S, or softmax(z_S)

A linear scorer and one of three conventions of `selectors/softmax.py`, which says how they differ.
"""

from __future__ import annotations

import dataclasses

from llava_moe.moe.component import check_k
from llava_moe.moe.routers.base import Router
from llava_moe.moe.routers.scored import ScoredRouter
from llava_moe.moe.scorers import LinearScorer
from llava_moe.moe.selectors import SELECTORS, Selector
from llava_moe.registry import near_misses

CONVENTIONS = ("softmax_topk_renorm", "softmax_topk", "topk_softmax")


class TopKRouter(ScoredRouter):
    """A linear scorer; each token keeps its k best experts."""

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
            convention: one of `CONVENTIONS`.
            bias: whether the scorer has a bias (initially zero).
            init_std: standard deviation of the initial scorer weights.
            scheduled_k: whether the controller k_schedule may lower the number of experts; see the selector.
        """

        k: int = 2
        convention: str = "softmax_topk_renorm"
        bias: bool = False
        init_std: float = 0.02
        scheduled_k: bool = False

    config: TopKRouter.Config

    def make_scorer(self) -> LinearScorer:
        options = LinearScorer.Config(bias=self.config.bias, init_std=self.config.init_std)
        return LinearScorer(self.hidden, self.num_experts, options)

    def make_selector(self) -> Selector:
        check_k("top_k router", self.config.k, self.num_experts)
        if self.config.convention not in CONVENTIONS:
            hint = near_misses(self.config.convention, list(CONVENTIONS))
            raise ValueError(f"top_k router: unknown convention {self.config.convention!r}; {hint}")
        return SELECTORS.get(self.config.convention).build(
            self.num_experts, {"k": self.config.k, "scheduled_k": self.config.scheduled_k}
        )
