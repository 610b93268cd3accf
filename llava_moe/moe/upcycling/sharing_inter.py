"""Sharing-Inter of LLaMA-MoE (2406.16554): what many experts want becomes always-on; the rest is divided.

    y = FFN restricted to the residual neurons + sum_e g_e FFN restricted to I_e

With E routed experts and R residual ones, each has M = F / (E + R) neurons. Until R x M neurons are residual, each
expert lists its M most important remaining neurons, and those that the most lists name become residual (where not all
of them fit, the ones with the largest sum of importances). Then the routed experts divide the remaining neurons:
greedily without sharing, or each takes its M most important ones.
The residual experts are the layer's shared experts: `SharedExperts` of total width R x M with `mix: sum`.
Shapes: F neurons, E routed experts, M neurons of one expert, S = R x M.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from llava_moe.moe.types import MlpSpec
from llava_moe.moe.upcycling.base import UpcycleJob, even_share
from llava_moe.moe.upcycling.partition import Assignment
from llava_moe.moe.upcycling.partition_gradient import ImportancePartition, greedy_assignment


class SharingInter(ImportancePartition):
    """Shared experts for what all need, routed ones for what remains."""

    @dataclasses.dataclass(frozen=True)
    class Config(ImportancePartition.Config):
        """Options.

        Attributes:
            num_residual: R; LLaMA-MoE has 2 beside 14 routed ones.
            sharing: whether routed experts may share neurons; then some neurons are in none.
            importance: "change" for |h dL/dh| or "gradient" for |dL/dh|.
            output_scale: one of `partition.SCALES`.
        """

        num_residual: int = 2
        sharing: bool = False

    config: SharingInter.Config

    def __init__(self, config: SharingInter.Config) -> None:
        self.disjoint = not config.sharing
        super().__init__(config)
        if config.num_residual < 1:
            raise ValueError(f"upcycler sharing_inter: num_residual={config.num_residual} must be at least 1")

    def _width(self, spec: MlpSpec, num_experts: int) -> int:
        return even_share("upcycler sharing_inter", spec.intermediate, num_experts + self.config.num_residual)

    def expert_spec(self, spec: MlpSpec, num_experts: int) -> MlpSpec:
        return spec.with_width(self._width(spec, num_experts))

    def shared_width(self, spec: MlpSpec, num_experts: int) -> int:
        return self._width(spec, num_experts) * self.config.num_residual

    def assign(self, job: UpcycleJob) -> Assignment:
        scores_EF = self.scores(job)
        width = self._width(job.spec, job.num_experts)
        residual_F = most_wanted(scores_EF, width, self.config.num_residual * width)
        if self.config.sharing:
            left_EF = scores_EF.masked_fill(residual_F, -torch.inf)
            routed_EM = left_EF.topk(width, dim=-1).indices.sort(dim=-1).values
        else:
            routed_EM = greedy_assignment(scores_EF, width, taken_F=residual_F)
        return Assignment(routed_EM, residual_F.nonzero().flatten())


def most_wanted(scores_EF: Tensor, width: int, count: int) -> Tensor:
    """Marks the `count` neurons that are on the most lists, (F,) bool; see the head of this file."""
    num_neurons = scores_EF.shape[1]
    chosen_F = torch.zeros(num_neurons, dtype=torch.bool, device=scores_EF.device)
    importance_F = scores_EF.sum(0)
    while (room := count - int(chosen_F.sum())) > 0:
        lists_EM = scores_EF.masked_fill(chosen_F, -torch.inf).topk(width, dim=-1).indices
        named_F = torch.bincount(lists_EM.flatten(), minlength=num_neurons)
        often = (named_F == named_F.max()).nonzero().flatten()
        first = importance_F[often].argsort(descending=True, stable=True)[:room]
        chosen_F[often[first]] = True
    return chosen_F
