"""Slow and obvious twins of the balance losses: one loop for each sum, in float64.

Every oracle takes (routing, context, config): two dicts of numpy arrays and the loss's `Config`. `routing` has logits
and probs (T, E), index and weight (T, K) and the extras by their name; `context` has mask, sequence, modality (T,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def softmax(scores: Any) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def real_tokens(context: Arrays) -> list[int]:
    return [t for t, real in enumerate(context["mask"]) if real]


def filled(routing: Arrays, t: int) -> list[tuple[int, float]]:
    """(expert, weight) of the token's filled slots."""
    num_experts = routing["probs"].shape[1]
    return [
        (int(e), float(w)) for e, w in zip(routing["index"][t], routing["weight"][t], strict=True) if e < num_experts
    ]


def loads(routing: Arrays, tokens: list[int]) -> list[int]:
    counts = [0] * routing["probs"].shape[1]
    for t in tokens:
        for expert, _ in filled(routing, t):
            counts[expert] += 1
    return counts


def mean_rows(matrix: np.ndarray, tokens: list[int]) -> list[float]:
    return [sum(float(matrix[t, e]) for t in tokens) / len(tokens) for e in range(matrix.shape[1])]


def squared_variation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return variance / (mean**2 + 1e-10)


def switch_of(routing: Arrays, scores: np.ndarray, tokens: list[int]) -> float:
    """E * sum_e f_e P_e over these tokens."""
    counts, prob = loads(routing, tokens), mean_rows(scores, tokens)
    return len(counts) * sum(c / max(sum(counts), 1) * p for c, p in zip(counts, prob, strict=True))


def switch(routing: Arrays, context: Arrays, config: Any) -> float:
    tokens = real_tokens(context)
    value = switch_of(routing, routing["probs"], tokens)
    return value if config.per == "slot" else value * sum(loads(routing, tokens)) / len(tokens)


def z(routing: Arrays, context: Arrays, config: Any) -> float:
    tokens = real_tokens(context)
    return sum(math.log(sum(math.exp(v) for v in routing["logits"][t])) ** 2 for t in tokens) / len(tokens)


def gshard(routing: Arrays, context: Arrays, config: Any) -> float:
    tokens = real_tokens(context)
    num_experts = routing["probs"].shape[1]
    firsts = [max(filled(routing, t), key=lambda slot: abs(slot[1]))[0] for t in tokens if filled(routing, t)]
    prob = mean_rows(routing["probs"], tokens)
    products = [firsts.count(e) / len(firsts) * prob[e] for e in range(num_experts)]
    return num_experts**2 * sum(products) / num_experts


def sequence(routing: Arrays, context: Arrays, config: Any) -> float:
    scores = routing["probs"]
    if config.scores == "sigmoid":
        scores = np.array([[1 / (1 + math.exp(-v)) for v in row] for row in routing["logits"]])
        scores = np.array([[v / sum(row) for v in row] for row in scores])
    rows: dict[int, list[int]] = {}
    for t in real_tokens(context):
        rows.setdefault(int(context["sequence"][t]), []).append(t)
    return sum(switch_of(routing, scores, tokens) for tokens in rows.values()) / len(rows)


def global_batch(routing: Arrays, context: Arrays, config: Any) -> float:
    """The first micro-batch of a step in one process."""
    return switch_of(routing, routing["probs"], real_tokens(context))


def heterogeneous(routing: Arrays, context: Arrays, config: Any) -> float:
    tokens = real_tokens(context)
    counts, prob = loads(routing, tokens), mean_rows(routing["probs"], tokens)
    total = 0.0
    for e, cheap in enumerate(routing["zero_compute_E"]):
        total += (config.tau if cheap else 1.0) * counts[e] / sum(counts) * prob[e]
    return total


def importance_load(routing: Arrays, context: Arrays, config: Any) -> float:
    tokens = real_tokens(context)
    importance = [0.0] * routing["probs"].shape[1]
    for t in tokens:
        for expert, weight in filled(routing, t):
            importance[expert] += weight
    load = [sum(float(routing["load_prob_TE"][t, e]) for t in tokens) for e in range(len(importance))]
    return squared_variation(importance) + squared_variation(load)


def entropy(routing: Arrays, context: Arrays, config: Any) -> float:
    rows = np.array([softmax(routing["logits"][t]) for t in real_tokens(context)])
    return sum(p * math.log(p) for p in mean_rows(rows, list(range(len(rows)))))


def max_z(routing: Arrays, context: Arrays, config: Any) -> float:
    tokens = real_tokens(context)
    return sum(max(routing["logits"][t]) ** 2 for t in tokens) / len(tokens)


def localised(routing: Arrays, context: Arrays, config: Any) -> float:
    num_experts = routing["probs"].shape[1]
    image = config.image_experts
    if image is None:
        image = range(num_experts // 2, num_experts)
    products = []
    for modality in (0, 1):
        tokens = [t for t in real_tokens(context) if context["modality"][t] == modality]
        if not tokens:
            continue
        for e, mass in enumerate(mean_rows(routing["probs"], tokens)):
            matches = (e in image) == (modality == 1)
            products.append((1 - config.delta if matches else 1 + config.delta) * mass)
    return squared_variation(products)


def locality(routing: Arrays, context: Arrays, config: Any) -> float:
    """In one process, which is the first node."""
    mass = mean_rows(routing["probs"], real_tokens(context))
    width, total = len(mass) // config.num_nodes, 0.0
    for node in range(config.num_nodes):
        share = sum(mass[node * width : (node + 1) * width]) / sum(mass)
        target = config.epsilon / config.num_nodes + (1 - config.epsilon if node == 0 else 0)
        total += share * math.log(share / target)
    return total


def relu_l1(routing: Arrays, context: Arrays, config: Any) -> float:
    tokens, num_experts = real_tokens(context), routing["probs"].shape[1]
    gates = [0.0] * num_experts
    for t in tokens:
        for expert, weight in filled(routing, t):
            gates[expert] += weight
    if not config.load_weighted:
        return sum(gates) / (len(tokens) * num_experts)
    weighted = sum(g * c for g, c in zip(gates, loads(routing, tokens), strict=True))
    return num_experts / (config.k * len(tokens) ** 2) * weighted


def competition(routing: Arrays, context: Arrays, config: Any) -> float:
    tokens = [t for t in real_tokens(context) if routing["competes_T"][t]]
    errors = []
    for t in tokens:
        found, wanted = softmax(routing["logits"][t]), softmax(routing["affinity_TE"][t])
        errors += [(a - b) ** 2 for a, b in zip(found, wanted, strict=True)]
    return sum(errors) / max(len(errors), 1)


def diversity(routing: Arrays, context: Arrays, config: Any) -> float:
    num_experts, means = routing["probs"].shape[1], []
    for t in real_tokens(context):
        outputs = [o for o, e in zip(routing["outputs_TKD"][t], routing["index"][t], strict=True) if e < num_experts]
        pairs = [(a, b) for i, a in enumerate(outputs) for j, b in enumerate(outputs) if i != j]
        if pairs:
            means.append(sum(cosine(a, b) for a, b in pairs) / len(pairs))
    return sum(means) / max(len(means), 1)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


def null_reward(routing: Arrays, context: Arrays, config: Any) -> float:
    tokens = real_tokens(context)
    return -sum(float(routing["null_prob_T"][t]) for t in tokens) / len(tokens)


BALANCE_LOSSES: dict[str, Callable[[Arrays, Arrays, Any], float]] = {
    "switch": switch,
    "z": z,
    "gshard": gshard,
    "sequence": sequence,
    "global_batch": global_batch,
    "heterogeneous": heterogeneous,
    "importance_load": importance_load,
    "entropy": entropy,
    "max_z": max_z,
    "localised": localised,
    "locality": locality,
    "relu_l1": relu_l1,
    "competition": competition,
    "diversity": diversity,
    "null_reward": null_reward,
}
