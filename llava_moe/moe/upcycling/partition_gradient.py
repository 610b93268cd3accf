"""Gradient-importance partition of LLaMA-MoE (2406.16554): each neuron goes to an expert that needs it most.

    (e, i) = argmax of v_ei over free neurons i and experts e with room, taken F times

The data are divided into E clusters, one for each expert, and v_ei is the importance of neuron i for cluster e (see
`statistics.py`). No neuron is shared. Shapes: F neurons, E experts, M neurons of one expert.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from llava_moe.moe.upcycling.base import UpcycleJob
from llava_moe.moe.upcycling.partition import Assignment, Partition
from llava_moe.moe.upcycling.statistics import IMPORTANCES
from llava_moe.registry import near_misses


class ImportancePartition(Partition):
    """Base of the partitions by importance."""

    needs = "gradients"
    collects = ("importance_CF",)

    @dataclasses.dataclass(frozen=True)
    class Config(Partition.Config):
        """Options.

        Attributes:
            importance: "change" for |h dL/dh| or "gradient" for |dL/dh|.
            output_scale: one of `partition.SCALES`.
        """

        importance: str = "change"

    config: ImportancePartition.Config

    def __init__(self, config: ImportancePartition.Config) -> None:
        super().__init__(config)
        if config.importance not in IMPORTANCES:
            hint = near_misses(config.importance, list(IMPORTANCES))
            raise ValueError(f"upcycler {type(self).__name__}: unknown importance {config.importance!r}; {hint}")

    def num_clusters(self, num_experts: int) -> int:
        return num_experts

    def accumulator_options(self) -> dict[str, Any]:
        return {"importance": self.config.importance}

    def scores(self, job: UpcycleJob) -> Tensor:
        """The importances (E, F).

        Raises:
            ValueError: they were collected for another number of clusters or neurons.
        """
        scores_EF = job.measured("importance_CF")
        wanted = (job.num_experts, job.spec.intermediate)
        if tuple(scores_EF.shape) != wanted:
            raise ValueError(
                f"upcycler {type(self).__name__}: the importances have the shape {tuple(scores_EF.shape)}, not "
                f"{wanted}: one cluster of data for each routed expert, and all neurons"
            )
        return scores_EF


class PartitionGradient(ImportancePartition):
    """Greedy, without sharing."""

    def assign(self, job: UpcycleJob) -> Assignment:
        scores_EF = self.scores(job)
        return Assignment(greedy_assignment(scores_EF, job.spec.intermediate // job.num_experts))


def greedy_assignment(scores_EF: Tensor, width: int, taken_F: Tensor | None = None) -> Tensor:
    """Takes the largest possible (expert, neuron) pair until each expert has `width` neurons, (E, width).

    Args:
        scores_EF: importances.
        width: M; at least E x M neurons must be free.
        taken_F: bool, neurons that no expert may get.
    """
    num_experts, num_neurons = scores_EF.shape
    free = [True] * num_neurons if taken_F is None else (~taken_F).tolist()
    chosen: list[list[int]] = [[] for _ in range(num_experts)]
    for pair in scores_EF.flatten().argsort(descending=True, stable=True).tolist():
        expert, neuron = divmod(pair, num_neurons)
        if free[neuron] and len(chosen[expert]) < width:
            chosen[expert].append(neuron)
            free[neuron] = False
    return torch.tensor(chosen).sort(dim=-1).values
