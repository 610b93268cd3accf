"""What the MoE layers did in one optimiser step. Shapes: T tokens, E experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from llava_moe.moe.capacity import DROPPED
from llava_moe.moe.types import Routing, SiteKey


@dataclass(frozen=True)
class LayerStats:
    """One layer over some micro-batches: sums (and one maximum) in float32 on the layer's device.

    Attributes:
        load_E: filled slots of each expert, padding not counted.
        num_tokens: real tokens, a scalar tensor.
        num_dropped: slots that a capacity emptied, a scalar tensor.
        max_logit: largest logit of a real token, a scalar tensor; -inf when there was none.
    """

    load_E: Tensor
    num_tokens: Tensor
    num_dropped: Tensor
    max_logit: Tensor

    @staticmethod
    @torch.no_grad()
    def measure(routing: Routing, mask_T: Tensor) -> LayerStats:
        """The statistics of one forward; `mask_T` is false for padding."""
        load_E = routing.load_E(mask_T)
        dropped_T = routing.extras.get(DROPPED)
        num_dropped = torch.zeros_like(load_E[0]) if dropped_T is None else (dropped_T * mask_T).sum().float()
        if routing.num_tokens == 0:
            max_logit = torch.full_like(load_E[0], -torch.inf)
        else:
            max_logit = routing.logits_TE.float().masked_fill(~mask_T.unsqueeze(-1), -torch.inf).max()
        return LayerStats(load_E, mask_T.sum().float(), num_dropped, max_logit)

    def __add__(self, other: LayerStats) -> LayerStats:
        return LayerStats(
            self.load_E + other.load_E,
            self.num_tokens + other.num_tokens,
            self.num_dropped + other.num_dropped,
            torch.maximum(self.max_logit, other.max_logit),
        )

    @property
    def drop_rate(self) -> Tensor:
        """Share of the slots that were filled before the capacity acted, and are empty after it."""
        return self.num_dropped / (self.num_dropped + self.load_E.sum()).clamp(min=1)


@dataclass(frozen=True)
class StepStats:
    """One optimiser step: its number from 1, the planned number of steps, and the sums of the MoE layers that ran."""

    step: int
    num_steps: int
    layers: Mapping[SiteKey, LayerStats]


class StepSums:
    """Adds up the micro-batches of a step; `finish` adds the ranks, in two collective calls for all layers."""

    def __init__(self) -> None:
        self._layers: dict[SiteKey, LayerStats] = {}

    def add(self, layers: Mapping[SiteKey, LayerStats]) -> None:
        """Takes the statistics of one micro-batch."""
        for site, stats in layers.items():
            self._layers[site] = self._layers[site] + stats if site in self._layers else stats

    def finish(self, step: int, num_steps: int) -> StepStats:
        """The sums over all ranks, which must have run the same layers; starts anew."""
        layers, self._layers = self._layers, {}
        if layers and dist.is_available() and dist.is_initialized():
            layers = _over_ranks(layers)
        return StepStats(step, num_steps, layers)


def _over_ranks(layers: Mapping[SiteKey, LayerStats]) -> dict[SiteKey, LayerStats]:
    sums = torch.cat([t.reshape(-1) for s in layers.values() for t in (s.load_E, s.num_tokens, s.num_dropped)])
    maxima = torch.stack([s.max_logit for s in layers.values()])
    dist.all_reduce(sums)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    parts = iter(sums.split([n for s in layers.values() for n in (s.load_E.numel(), 1, 1)]))
    return {
        site: LayerStats(next(parts), next(parts).squeeze(0), next(parts).squeeze(0), maximum)
        for site, maximum in zip(layers, maxima.unbind(), strict=True)
    }
