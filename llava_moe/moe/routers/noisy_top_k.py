"""Noisy top-k routing (Shazeer et al., 1701.06538, section 2.1), with the smooth load of its balance loss.

    z = x W^T        h = z + eps * std        S = top-k of h        g = softmax(h_S)
    P_te = Phi((z_te - threshold_te) / std_te)        the chance that expert e is in S when its own noise is drawn again

threshold_te is the k-th largest h of the token among the other experts. Without noise, in evaluation, P is 1 for the
chosen experts and 0 for the others. Shapes: T tokens, D hidden width, E experts, K slots of a token.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llava_moe.moe.routers.base import Router
from llava_moe.moe.routers.scored import ScoredRouter
from llava_moe.moe.scorers.noisy_linear import NOISE_STD, NoisyLinearScorer
from llava_moe.moe.selectors.softmax import TopKSoftmax
from llava_moe.moe.types import Routing, RoutingContext

LOAD_PROB = "load_prob_TE"


class NoisyTopKRouter(ScoredRouter):
    """Top-k of noisy scores; provides the extra `load_prob_TE`, float32, for the loss importance_load.

    `logits_TE` is without noise; `probs_TE` is the softmax of the scores that were compared.
    """

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
            init_std: standard deviation of the initial scorer weights; the paper starts from 0.
            noise_floor: least standard deviation of the noise.
        """

        k: int = 2
        init_std: float = 0.0
        noise_floor: float = 1e-2

    config: NoisyTopKRouter.Config

    def __init__(self, hidden: int, num_experts: int, config: NoisyTopKRouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        self.extras = (LOAD_PROB,)

    def make_scorer(self) -> NoisyLinearScorer:
        options = NoisyLinearScorer.Config(init_std=self.config.init_std, noise_floor=self.config.noise_floor)
        return NoisyLinearScorer(self.hidden, self.num_experts, options)

    def make_selector(self) -> TopKSoftmax:
        return TopKSoftmax(self.num_experts, TopKSoftmax.Config(k=self.config.k))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        scores = self.scorer(x_TD, context)
        chosen = self.selector(scores.selection_TE, context)
        if self.training:
            load_TE = load_probability(scores.logits_TE, scores.selection_TE, scores.extras[NOISE_STD], self.config.k)
        else:
            load_TE = torch.zeros_like(scores.logits_TE).scatter(1, chosen.index_TK, 1.0)
        return Routing(scores.logits_TE, chosen.probs_TE, chosen.index_TK, chosen.weight_TK, {LOAD_PROB: load_TE})


def load_probability(logits_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, k: int) -> Tensor:
    """P of the head of this file, (T, E), differentiable in all three."""
    if k == logits_TE.shape[-1]:
        return torch.ones_like(logits_TE)
    top_TK = noisy_TE.topk(k + 1, dim=-1).values
    last_in, first_out = top_TK[:, k - 1 : k], top_TK[:, k : k + 1]
    threshold_TE = torch.where(noisy_TE > first_out, first_out, last_in)
    return torch.special.ndtr((logits_TE - threshold_TE) / std_TE)
