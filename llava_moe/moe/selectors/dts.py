"""Dense-to-sparse selection (EvoMoE, 2112.14397): a Gumbel softmax that is annealed until few experts remain.

    G = softmax((z + gumbel) / temperature)        S = {e : G_e > threshold}        g = G_S        in training
    q = softmax(z / temperature)                   S = top-k                        g = q_S        in evaluation

The weights are not divided by their sum. At and below the temperature `hard_at` a training token keeps its best
expert only, with weight 1 and the gradient of G (straight through), and the weights of evaluation sum to 1.
`probs_TE` is G in training and q in evaluation. Shapes: T tokens, E experts, K slots: E in training, k in evaluation.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llava_moe.moe.component import check_k
from llava_moe.moe.selectors.base import Selection, Selector
from llava_moe.moe.types import RoutingContext

# A schedule may end at 0, the one-hot limit; dividing by less than this would overflow.
LEAST_TEMPERATURE = 1e-4


class DenseToSparse(Selector):
    """The experts above a threshold of a Gumbel softmax; the controller temperature moves the buffer `temperature`.

    Raises:
        ValueError: k, the threshold or a temperature is out of its range.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Selector.Config):
        """Options.

        Attributes:
            k: experts of a token in evaluation; the released code takes 1.
            temperature: the initial one; the authors' scripts anneal 2.0 to 0.3.
            threshold: least G of a chosen expert, at least 0 and below 1.
            gumbel_weights: whether the training weights are G; otherwise they are softmax(z) without noise.
            hard_at: temperature at and below which one expert is taken; None never does.
        """

        k: int = 1
        temperature: float = 2.0
        threshold: float = 1e-3
        gumbel_weights: bool = True
        hard_at: float | None = None

    config: DenseToSparse.Config
    normalised = False
    stochastic = True
    float32_buffers = ("temperature",)
    temperature: Tensor

    def __init__(self, num_experts: int, config: DenseToSparse.Config) -> None:
        super().__init__(num_experts, config)
        check_k("selector dts", config.k, num_experts)
        if not config.temperature > 0:
            raise ValueError(f"selector dts: temperature={config.temperature} must be above 0")
        if not 0 <= config.threshold < 1:
            raise ValueError(f"selector dts: threshold={config.threshold} must be at least 0 and below 1")
        if config.hard_at is not None and not config.hard_at >= 0:
            raise ValueError(f"selector dts: hard_at={config.hard_at} must be at least 0")
        self.register_buffer("temperature", torch.tensor(config.temperature, dtype=torch.float32))

    @property
    def active_experts(self) -> float:
        return self.config.k

    def forward(self, scores_TE: Tensor, context: RoutingContext) -> Selection:
        temperature = self.temperature.clamp(min=LEAST_TEMPERATURE)
        hard = None if self.config.hard_at is None else self.temperature <= self.config.hard_at
        return (self._noisy if self.training else self._top)(scores_TE, temperature, hard)

    def _noisy(self, scores_TE: Tensor, temperature: Tensor, hard: Tensor | None) -> Selection:
        tiny = torch.finfo(torch.float32).tiny
        gumbel_TE = -torch.empty_like(scores_TE).exponential_().clamp(min=tiny).log()
        probs_TE = ((scores_TE + gumbel_TE) / temperature).softmax(dim=-1)
        ranked_TK, index_TK = probs_TE.sort(dim=-1, descending=True)
        weight_TK = ranked_TK if self.config.gumbel_weights else scores_TE.softmax(dim=-1).gather(-1, index_TK)
        off_TK = ranked_TK <= self.config.threshold
        if hard is not None:
            off_TK = off_TK | hard
            weight_TK = torch.where(hard, weight_TK + (1 - weight_TK).detach(), weight_TK)
        off_TK[:, 0] = False  # with very many experts none might pass the threshold
        return Selection(probs_TE, index_TK.masked_fill(off_TK, self.num_experts), weight_TK.masked_fill(off_TK, 0.0))

    def _top(self, scores_TE: Tensor, temperature: Tensor, hard: Tensor | None) -> Selection:
        probs_TE = (scores_TE / temperature).softmax(dim=-1)
        weight_TK, index_TK = probs_TE.topk(self.config.k, dim=-1)
        if hard is not None:
            weight_TK = torch.where(hard, weight_TK / weight_TK.sum(dim=-1, keepdim=True), weight_TK)
        return Selection(probs_TE, index_TK, weight_TK)
