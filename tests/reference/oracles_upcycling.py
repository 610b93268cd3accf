"""Slow and obvious twins of what upcyclers and growers compute: plain Python numbers and loops."""

from __future__ import annotations

import itertools

Vector = list[float]
Matrix = list[list[float]]


def greedy_pairs(scores: Matrix, width: int, taken: set[int] = frozenset()) -> list[set[int]]:  # type: ignore[assignment]
    """No-sharing assignment: the largest remaining (expert, neuron) pair, until every expert is full."""
    experts: list[set[int]] = [set() for _ in scores]
    used = set(taken)
    while any(len(expert) < width for expert in experts):
        pairs = [
            (score, -e, -i)
            for e, row in enumerate(scores)
            for i, score in enumerate(row)
            if i not in used and len(experts[e]) < width
        ]
        _, e, i = max(pairs)
        experts[-e].add(-i)
        used.add(-i)
    return experts


def residual_set(scores: Matrix, width: int, count: int) -> set[int]:
    """Sharing-Inter: move what most top lists name, until `count` neurons are residual."""
    residual: set[int] = set()
    while len(residual) < count:
        left = [i for i in range(len(scores[0])) if i not in residual]
        lists = [sorted(left, key=lambda i: -row[i])[:width] for row in scores]
        named = {i: sum(i in chosen for chosen in lists) for i in left}
        often = [i for i in left if named[i] == max(named.values())]
        often.sort(key=lambda i: -sum(row[i] for row in scores))
        residual |= set(often[: count - len(residual)])
    return residual


def importance(hidden: Matrix, gradient: Matrix, clusters: list[int], num_clusters: int) -> Matrix:
    """v_ci = sum over the tokens of cluster c of |h_i g_i|; cluster -1 does not count."""
    found = [[0.0] * len(hidden[0]) for _ in range(num_clusters)]
    for h, g, cluster in zip(hidden, gradient, clusters, strict=True):
        if cluster >= 0:
            for i, (value, slope) in enumerate(zip(h, g, strict=True)):
                found[cluster][i] += abs(value * slope)
    return found


def coactivation(batches: list[Matrix], clamp: float) -> Matrix:
    """A_ij = sum over batches of min(sum over tokens of h_i h_j, clamp)."""
    width = len(batches[0][0])
    return [
        [sum(min(sum(h[i] * h[j] for h in batch), clamp) for batch in batches) for j in range(width)]
        for i in range(width)
    ]


def inside_weight(graph: Matrix, parts: list[set[int]]) -> float:
    """Total weight of the edges that stay inside a part."""
    return sum(graph[i][j] for part in parts for i, j in itertools.combinations(sorted(part), 2))


def best_halves(graph: Matrix) -> float:
    """The most weight that two equal halves can keep inside, by trying them all."""
    nodes = set(range(len(graph)))
    halves = itertools.combinations(sorted(nodes), len(nodes) // 2)
    return max(inside_weight(graph, [set(half), nodes - set(half)]) for half in halves)


def virtual_group_scale(replicas: int, granularity: int, active: int) -> float:
    """E G^2 / T of 2410.07524, with its E the number of replicas."""
    return replicas * granularity**2 / active


def grow_fpi(matrix: Matrix, rows: int, columns: int) -> Matrix:
    """Copied rows, copied and divided columns."""
    source_rows, source_columns = len(matrix), len(matrix[0])
    hits = [sum(j % source_columns == s for j in range(columns)) for s in range(source_columns)]
    return [
        [matrix[i % source_rows][j % source_columns] / hits[j % source_columns] for j in range(columns)]
        for i in range(rows)
    ]


def grow_aki(own: Matrix, above: Matrix, rows: int, columns: int) -> Matrix:
    """As `grow_fpi`, but the rows beyond those of the source come from the layer above."""
    first, second = grow_fpi(own, rows, columns), grow_fpi(above, rows, columns)
    return first[: len(own)] + second[len(own) :]


def llama_parameters(
    hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, layers: int, vocabulary: int, tied: bool
) -> int:
    """V D (twice unless tied) + L (2 D H d + 2 D K d + 3 D F + 2 D) + D, without biases."""
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    return vocabulary * hidden * (1 if tied else 2) + layers * layer + hidden
