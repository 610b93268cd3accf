"""Sharing-Inner of LLaMA-MoE (2406.16554): each expert takes the neurons that matter most for its cluster of the data.

    I_e = the F / E neurons i with the largest v_ei

Experts may share neurons, and some neurons are in none, so the sum of the experts is not the dense block.
"""

from __future__ import annotations

from llava_moe.moe.upcycling.base import Contract, UpcycleJob
from llava_moe.moe.upcycling.partition import Assignment
from llava_moe.moe.upcycling.partition_gradient import ImportancePartition


class SharingInner(ImportancePartition):
    """The F / E most important neurons of each cluster."""

    contract = Contract.NONE
    disjoint = False

    def assign(self, job: UpcycleJob) -> Assignment:
        width = job.spec.intermediate // job.num_experts
        return Assignment(self.scores(job).topk(width, dim=-1).indices.sort(dim=-1).values)
