"""Co-activation graph partition (MoEfication 2110.01786, LLaMA-MoE 2406.16554): what fires together stays together.

    maximise sum_e sum_(i, j in I_e, i != j) A_ij        |I_e| = F / E

The graph has an edge of weight A_ij between neurons i and j (see `statistics.py`). The originals thin it out to integer
weights and give it to METIS; here the experts grow greedily on the graph as it is, and pairs of neurons of different
experts are then exchanged (Kernighan and Lin, 1970) for as long as that raises the total weight inside the experts.
Nothing is random. Shapes: F neurons, E experts, M neurons of one expert.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from llava_moe.moe.upcycling.base import UpcycleJob
from llava_moe.moe.upcycling.partition import Assignment, Partition, members

_CANDIDATES = 32


class PartitionCoactivation(Partition):
    """Needs the co-activations of the neurons on real data."""

    needs = "activations"
    collects = ("coactivation_FF",)

    @dataclasses.dataclass(frozen=True)
    class Config(Partition.Config):
        """Options.

        Attributes:
            clamp: bound on what one batch adds to a co-activation; null for no bound.
            sweeps: rounds of exchanges over all pairs of experts at the most; 0 leaves the greedy groups.
            output_scale: one of `partition.SCALES`.
        """

        clamp: float | None = None
        sweeps: int = 10

    config: PartitionCoactivation.Config

    def __init__(self, config: PartitionCoactivation.Config) -> None:
        super().__init__(config)
        if config.clamp is not None and config.clamp <= 0:
            raise ValueError(f"upcycler partition_coactivation: clamp={config.clamp} must be above 0")
        if config.sweeps < 0:
            raise ValueError(f"upcycler partition_coactivation: sweeps={config.sweeps} must be at least 0")

    def accumulator_options(self) -> dict[str, Any]:
        return {"clamp": self.config.clamp}

    def assign(self, job: UpcycleJob) -> Assignment:
        labels_F = balanced_graph_partition(job.measured("coactivation_FF"), job.num_experts, self.config.sweeps)
        return Assignment(members(labels_F, job.num_experts))


def balanced_graph_partition(weight_FF: Tensor, num_parts: int, sweeps: int) -> Tensor:
    """Labels (F,) of equally large parts of a symmetric graph with much weight inside the parts, int64."""
    graph_FF = weight_FF.to(torch.float64, copy=True).fill_diagonal_(0)
    labels_F = _grow(graph_FF, num_parts)
    # How much every neuron is tied to each part.
    tie_FE = graph_FF @ nn.functional.one_hot(labels_F, num_parts).double()
    least_F = graph_FF.amin(dim=1)
    for _ in range(sweeps):
        exchanged = False
        for a in range(num_parts):
            for b in range(a + 1, num_parts):
                exchanged |= _refine(graph_FF, least_F, tie_FE, labels_F, a, b)
        if not exchanged:
            break
    return labels_F


def _grow(graph_FF: Tensor, num_parts: int) -> Tensor:
    """Each part starts at the free neuron with the most weight to free ones and takes what is tied to it most."""
    size = len(graph_FF) // num_parts
    labels_F = torch.full((len(graph_FF),), -1, device=graph_FF.device)
    for part in range(num_parts):
        free_F = (labels_F < 0).double()
        tie_F = graph_FF @ free_F
        inside_F = torch.zeros_like(tie_F)
        for step in range(size):
            score_F = tie_F if step == 0 else inside_F
            chosen = int(score_F.masked_fill(labels_F >= 0, -torch.inf).argmax())
            labels_F[chosen] = part
            inside_F += graph_FF[chosen]
    return labels_F


def _refine(graph_FF: Tensor, least_F: Tensor, tie_FE: Tensor, labels_F: Tensor, a: int, b: int) -> bool:
    """Exchanges a good pair of two parts until none helps, in place; whether there was one."""
    in_a, in_b = (labels_F == a).nonzero().flatten(), (labels_F == b).nonzero().flatten()
    pull_F = tie_FE[:, b] - tie_FE[:, a]
    tolerance = 1e-9 * float(pull_F.abs().max())
    exchanged = False
    # Every exchange raises the weight inside the parts by more than the tolerance, so this ends.
    while (pair := _helpful_pair(graph_FF, least_F, pull_F, in_a, in_b, tolerance)) is not None:
        exchanged = True
        i, j = pair
        to_b, to_a = int(in_a[i]), int(in_b[j])
        labels_F[to_b], labels_F[to_a] = b, a
        in_a[i], in_b[j] = to_a, to_b
        change_F = graph_FF[to_b] - graph_FF[to_a]
        tie_FE[:, a] -= change_F
        tie_FE[:, b] += change_F
        pull_F += 2 * change_F
    return exchanged


def _helpful_pair(
    graph_FF: Tensor, least_F: Tensor, pull_F: Tensor, in_a: Tensor, in_b: Tensor, tolerance: float
) -> tuple[int, int] | None:
    """Places in `in_a` and `in_b` of a pair worth exchanging, None when there is none.

    The most drawn neurons of both parts are tried first. All pairs are M x M; before giving up, those are looked at
    that could help with the least weight that their edge can have.
    """
    pull_a, pull_b = pull_F[in_a], pull_F[in_b]
    few = min(_CANDIDATES, len(in_a))
    first, second = pull_a.topk(few).indices, (-pull_b).topk(few).indices
    pair = _best_pair(graph_FF, pull_F, in_a, in_b, first, second, tolerance)
    if pair is None and few < len(in_a):
        first = (pull_a - 2 * least_F[in_a] - pull_b.min() > tolerance).nonzero().flatten()
        second = (pull_a.max() - pull_b - 2 * least_F[in_b] > tolerance).nonzero().flatten()
        if len(first) and len(second):
            pair = _best_pair(graph_FF, pull_F, in_a, in_b, first, second, tolerance)
    return pair


def _best_pair(
    graph_FF: Tensor, pull_F: Tensor, in_a: Tensor, in_b: Tensor, first: Tensor, second: Tensor, tolerance: float
) -> tuple[int, int] | None:
    """The best of the pairs of these places, if it is worth an exchange."""
    from_a, from_b = in_a[first], in_b[second]
    gain = pull_F[from_a].unsqueeze(1) - pull_F[from_b] - 2 * graph_FF[from_a.unsqueeze(1), from_b]
    i, j = divmod(int(gain.argmax()), len(from_b))
    return (int(first[i]), int(second[j])) if float(gain[i, j]) > tolerance else None
