"""CompeteSMoE (2505.13380): the router learns from competitions between all experts, held now and then in training.

    usual step        p = softmax(x W^T)                     k best, weights renormalised
    competition step  a_e = mean over D of softplus(E_e(x))  k best by a, g_e = a_e / sum of the k; p = softmax(a)

A layer competes while its buffer `competes` is not 0; the controller `competition` sets it for every step, and
evaluation never competes. The router has no schedule and no randomness of its own, so ranks cannot part. The gradient
of y reaches the winners alone: the layer runs them again, and g knows only their affinities. That the winners run twice
is the price of keeping routers and experts apart; a competition runs all E experts anyway.
Shapes: T tokens, D output width of the experts, E experts, K slots.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_moe.moe.component import check_k
from llava_moe.moe.routers.base import Router
from llava_moe.moe.scorers import LinearScorer
from llava_moe.moe.types import Routing, RoutingContext

if TYPE_CHECKING:
    from llava_moe.moe.experts import Experts


class CompeteSMoERouter(Router):
    """Softmax top-k between competitions.

    Extras, all zero (without memory of their own) where the layer did not compete:
        affinity_TE: a, without gradient: the target of the `competition` loss, whose input is softmax(logits_TE).
        competes_T: 1.0 where the token's layer competed.
        outputs_TKD: what the winners returned, with gradient: for the `diversity` loss.
    """

    needs_experts = True
    extras = ("affinity_TE", "competes_T", "outputs_TKD")
    float32_buffers: ClassVar[tuple[str, ...]] = ("competes",)

    @dataclasses.dataclass(frozen=True)
    class Config(Router.Config):
        """Options.

        Attributes:
            k: experts of a token, 1..E.
            init_std: standard deviation of the initial scorer weights.
        """

        k: int = 2
        init_std: float = 0.02

    config: CompeteSMoERouter.Config

    def __init__(self, hidden: int, num_experts: int, config: CompeteSMoERouter.Config) -> None:
        super().__init__(hidden, num_experts, config)
        check_k("compete_smoe router", config.k, num_experts)
        self.scorer = LinearScorer(hidden, num_experts, LinearScorer.Config(init_std=config.init_std))
        self.output = hidden
        self.register_buffer("competes", torch.zeros((), dtype=torch.float32))
        self.competes: Tensor
        self._read = (self.competes, self.competes._version, False)

    @property
    def active_experts(self) -> float:
        return self.config.k

    def attach(self, experts: Experts) -> None:
        self.output = experts.spec.output

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        self.scorer.reset_parameters(generator)

    def tie_rows(self, group: int) -> None:
        self.scorer.tie_rows(group)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Routing:
        logits_TE = self.scorer(x_TD, context).logits_TE
        if self.training and self._competes():
            return self._competition(logits_TE, x_TD, context)
        probs_TE = logits_TE.softmax(dim=-1)
        top_TK, index_TK = probs_TE.topk(self.config.k, dim=-1)
        shape, zero = index_TK.shape, x_TD.new_zeros(())
        extras = {
            "affinity_TE": zero.float().expand(logits_TE.shape),
            "competes_T": zero.float().expand(shape[0]),
            "outputs_TKD": zero.expand(*shape, self.output),
        }
        return Routing(logits_TE, probs_TE, index_TK, top_TK / top_TK.sum(-1, keepdim=True), extras)

    def _competes(self) -> bool:
        """The knob as the host knows it, which must decide: a competition launches E times the work.

        It is read from the device only after somebody wrote to it, at most once for each optimiser step.
        """
        buffer, version, value = self._read
        if buffer is not self.competes or version != self.competes._version:
            value = bool(self.competes)
            self._read = (self.competes, self.competes._version, value)
        return value

    def _competition(self, logits_TE: Tensor, x_TD: Tensor, context: RoutingContext) -> Routing:
        if context.run_experts is None:
            raise ValueError("compete_smoe router: a competition needs context.run_experts, which a MoELayer sets")
        outputs_TED = context.run_experts(x_TD)
        affinity_TE = F.softplus(outputs_TED.float()).mean(dim=-1)
        top_TK, index_TK = affinity_TE.topk(self.config.k, dim=-1)
        slots_TKD = index_TK.unsqueeze(-1).expand(-1, -1, outputs_TED.shape[-1])
        extras = {
            "affinity_TE": affinity_TE.detach(),
            "competes_T": torch.ones_like(affinity_TE[:, 0]),
            "outputs_TKD": outputs_TED.gather(1, slots_TKD),
        }
        weight_TK = top_TK / top_TK.sum(-1, keepdim=True)
        return Routing(logits_TE, affinity_TE.softmax(dim=-1), index_TK, weight_TK, extras)
