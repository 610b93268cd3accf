"""The global-batch balance loss (Qiu et al., 2501.11873; Megatron-LM's `global_aux_loss`).

    L = E * sum_e F_e P_e      F_e = share of the filled slots so far in this step      P_e = mean probability

The formula is that of Switch, and P and its gradient are those of the micro-batch at hand. F counts more: the slots of
all ranks (summed by all_reduce when torch.distributed is initialised; every rank must have the same layers) and of all
micro-batches of this optimiser step up to and including this one. So in a step of A micro-batches the first sees the F
of itself (over all ranks) and only the last one that of the whole step: an earlier graph is gone when a later load is
known. The mean over equally full ranks is therefore exactly the loss of their joint batch; the mean over micro-batches
is that only where their loads are alike. `start_step` forgets what was counted.

Experts may specialise by domain under it, as no single sequence or micro-batch has to be balanced. Shapes: E experts.
"""

from __future__ import annotations

from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from llava_moe.moe.losses.base import BalanceLoss, masked_mean, shares
from llava_moe.moe.types import Routing, RoutingContext, SiteKey


class GlobalBatch(BalanceLoss):
    """Switch with the load of all ranks and of the step so far, kept for each layer by its site."""

    scope: ClassVar[str] = "global"

    def __init__(self, config: GlobalBatch.Config | None = None) -> None:
        super().__init__(config)
        self._load_E: dict[SiteKey, Tensor] = {}

    def start_step(self) -> None:
        self._load_E.clear()

    def __call__(self, routing: Routing, context: RoutingContext) -> Tensor:
        load_E = routing.load_E(context.token_mask_T).detach()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load_E)
        if context.site in self._load_E:
            load_E = load_E + self._load_E[context.site]
        self._load_E[context.site] = load_E
        prob_E = masked_mean(routing.probs_TE, context.token_mask_T)
        return routing.num_experts * (shares(load_E) * prob_E).sum()
