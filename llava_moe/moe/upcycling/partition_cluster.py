"""Independent-Clustering of LLaMA-MoE (2406.16554): balanced k-means of the neurons by their input weights.

    minimise sum_e sum_(i in I_e) dist(u_i, c_e)        u_i = w_i / ||w_i||, c_e = mean of u_i over I_e, |I_e| = F / E

The points are the L2-normalised rows of the up (or the gate) projection; every cluster has exactly F / E of them.
Centroids start as in k-means++. The assignment step exchanges points between pairs of clusters for as long as that
lowers the cost, so with the squared distance the objective never rises.
Shapes: F neurons, D hidden width, E clusters.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llava_moe.moe.upcycling.base import UpcycleJob
from llava_moe.moe.upcycling.partition import Assignment, Partition, members
from llava_moe.registry import near_misses

ROWS, METRICS = ("up", "gate"), ("l2", "cosine")


class PartitionCluster(Partition):
    """Neurons that look at the input alike become one expert."""

    @dataclasses.dataclass(frozen=True)
    class Config(Partition.Config):
        """Options.

        Attributes:
            rows: whose rows are the points, "up" or "gate".
            metric: "l2" or "cosine".
            max_iter: rounds at the most.
            output_scale: one of `partition.SCALES`.
        """

        rows: str = "up"
        metric: str = "l2"
        max_iter: int = 500

    config: PartitionCluster.Config

    def __init__(self, config: PartitionCluster.Config) -> None:
        super().__init__(config)
        for key, allowed in (("rows", ROWS), ("metric", METRICS)):
            value = getattr(config, key)
            if value not in allowed:
                hint = near_misses(value, list(allowed))
                raise ValueError(f"upcycler partition_cluster: unknown {key} {value!r}; {hint}")
        if config.max_iter < 1:
            raise ValueError(f"upcycler partition_cluster: max_iter={config.max_iter} must be at least 1")

    def assign(self, job: UpcycleJob) -> Assignment:
        rows_FD = job.dense.first[-job.spec.intermediate :]
        if self.config.rows == "gate":
            if not job.spec.gated:
                raise ValueError("upcycler partition_cluster: rows='gate', but the dense block has no gate")
            rows_FD = job.dense.first[: job.spec.intermediate]
        cosine = self.config.metric == "cosine"
        labels_F = balanced_kmeans(
            normalize(rows_FD.float(), dim=-1), job.num_experts, job.generator, cosine, self.config.max_iter
        )
        return Assignment(members(labels_F, job.num_experts))


def balanced_kmeans(
    points_FD: Tensor, num_clusters: int, generator: torch.Generator, cosine: bool, max_iter: int
) -> Tensor:
    """Labels (F,) of clusters of exactly F / E points each, int64."""
    centroids_ED = _first_centroids(points_FD, num_clusters, generator)
    labels_F: Tensor | None = None
    for _ in range(max_iter):
        fresh_F = balanced_labels(_costs(points_FD, centroids_ED, cosine), labels_F)
        if labels_F is not None and torch.equal(fresh_F, labels_F):
            break
        labels_F = fresh_F
        centroids_ED = torch.zeros_like(centroids_ED).index_add_(0, labels_F, points_FD)
        centroids_ED *= num_clusters / len(points_FD)
    assert labels_F is not None
    return labels_F


def _costs(points_FD: Tensor, centroids_ED: Tensor, cosine: bool) -> Tensor:
    if cosine:
        return 1 - points_FD @ normalize(centroids_ED, dim=-1).t()
    # The squared norm of the point is the same for all clusters.
    return centroids_ED.square().sum(-1) - 2 * points_FD @ centroids_ED.t()


def _first_centroids(points_FD: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centroid is a point drawn with its squared distance to the nearest one so far."""
    chosen = int(torch.randint(len(points_FD), (1,), generator=generator, device=generator.device))
    centroids = [points_FD[chosen]]
    nearest_F = torch.full((len(points_FD),), float("inf"), device=points_FD.device)
    for _ in range(num_clusters - 1):
        nearest_F = torch.minimum(nearest_F, (points_FD - centroids[-1]).square().sum(-1))
        weights_F = nearest_F.to(generator.device).clamp(min=1e-12)
        chosen = int(torch.multinomial(weights_F, 1, generator=generator))
        centroids.append(points_FD[chosen])
    return torch.stack(centroids)


def balanced_labels(cost_FE: Tensor, start_F: Tensor | None = None) -> Tensor:
    """Labels of equally large clusters of low total cost, (F,); pairwise exchanges cannot lower it any more.

    Starts from `start_F`, or greedily with the points that care most. The number of points is a multiple of E.
    """
    labels_F = _greedy_labels(cost_FE) if start_F is None else start_F.clone()
    num_clusters = cost_FE.shape[1]
    tolerance = 1e-6 * float(cost_FE.abs().max())
    improved = True
    while improved:
        improved = False
        for a in range(num_clusters):
            for b in range(a + 1, num_clusters):
                improved |= _exchange(labels_F, cost_FE[:, a], cost_FE[:, b], a, b, tolerance)
    return labels_F


def _exchange(labels_F: Tensor, cost_a: Tensor, cost_b: Tensor, a: int, b: int, tolerance: float) -> bool:
    """The best exchange of any number of points between two clusters, in place; whether there was one."""
    in_a, in_b = (labels_F == a).nonzero().flatten(), (labels_F == b).nonzero().flatten()
    gain_a, order_a = (cost_a - cost_b)[in_a].sort(descending=True, stable=True)
    gain_b, order_b = (cost_b - cost_a)[in_b].sort(descending=True, stable=True)
    # Sums of two falling sequences fall too, so the worthwhile pairs come first.
    count = int((gain_a + gain_b > tolerance).sum())
    labels_F[in_a[order_a[:count]]] = b
    labels_F[in_b[order_b[:count]]] = a
    return count > 0


def _greedy_labels(cost_FE: Tensor) -> Tensor:
    num_points, num_clusters = cost_FE.shape
    room = [num_points // num_clusters] * num_clusters
    labels = [0] * num_points
    best_F2 = cost_FE.topk(min(2, num_clusters), largest=False).values
    regret_F = best_F2[:, -1] - best_F2[:, 0]
    preference = cost_FE.argsort(dim=-1, stable=True).tolist()
    for point in regret_F.argsort(descending=True, stable=True).tolist():
        label = next(e for e in preference[point] if room[e] > 0)
        labels[point] = label
        room[label] -= 1
    return torch.tensor(labels, device=cost_FE.device)
