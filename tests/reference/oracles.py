"""Slow and obvious twins of what the package computes: plain Python numbers and loops, one formula a line.

A router or a balance loss that a recipe may name has an oracle of the same name here. Matrices are lists of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Vector = list[float]
Matrix = list[list[float]]


def softmax(scores: Vector) -> Vector:
    highest = max(scores)
    powers = [math.exp(score - highest) for score in scores]
    return [power / sum(powers) for power in powers]


def matvec(matrix: Matrix, vector: Vector) -> Vector:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def top_k(
    tokens: Matrix, weight: Matrix, bias: Vector | None, *, k: int, convention: str
) -> tuple[list[list[int]], Matrix, Matrix]:
    """Each token's experts, best first, their weights, and its probabilities over all experts."""
    indices, weights, probabilities = [], [], []
    for token in tokens:
        logits = matvec(weight, token)
        if bias is not None:
            logits = [z + b for z, b in zip(logits, bias, strict=True)]
        p = softmax(logits)
        chosen = sorted(range(len(p)), key=lambda e: -p[e])[:k]
        if convention == "softmax_topk_renorm":
            g = [p[e] / sum(p[j] for j in chosen) for e in chosen]
        elif convention == "softmax_topk":
            g = [p[e] for e in chosen]
        elif convention == "topk_softmax":
            g = softmax([logits[e] for e in chosen])
        else:
            raise ValueError(convention)
        indices.append(chosen)
        weights.append(g)
        probabilities.append(p)
    return indices, weights, probabilities


def activation(name: str) -> Callable[[float], float]:
    return {
        "silu": lambda x: x / (1 + math.exp(-x)),
        "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
        "relu": lambda x: max(x, 0.0),
        "relu2": lambda x: max(x, 0.0) ** 2,
    }[name]


def expert(
    token: Vector,
    first: Matrix,
    down: Matrix,
    first_bias: Vector | None,
    down_bias: Vector | None,
    act: str,
    gated: bool,
) -> Vector:
    """One feed-forward block on one token; `first` has the gate rows before the up rows when gated."""
    hidden = matvec(first, token)
    if first_bias is not None:
        hidden = [h + b for h, b in zip(hidden, first_bias, strict=True)]
    f = activation(act)
    if gated:
        half = len(hidden) // 2
        hidden = [f(gate) * up for gate, up in zip(hidden[:half], hidden[half:], strict=True)]
    else:
        hidden = [f(h) for h in hidden]
    output = matvec(down, hidden)
    return output if down_bias is None else [o + b for o, b in zip(output, down_bias, strict=True)]


def mixture(
    tokens: Matrix,
    indices: list[list[int]],
    weights: Matrix,
    first: list[Matrix],
    down: list[Matrix],
    first_bias: Matrix | None,
    down_bias: Matrix | None,
    act: str,
    gated: bool,
) -> Matrix:
    """y_t = sum over filled slots of weight * expert(x_t); an index of E is an empty slot."""
    outputs = []
    for token, chosen, shares in zip(tokens, indices, weights, strict=True):
        y = [0.0] * len(token)
        for e, share in zip(chosen, shares, strict=True):
            if e == len(first):
                continue
            biases = [None if b is None else b[e] for b in (first_bias, down_bias)]
            out = expert(token, first[e], down[e], biases[0], biases[1], act, gated)
            y = [total + share * value for total, value in zip(y, out, strict=True)]
        outputs.append(y)
    return outputs


def switch(logits: Matrix, probs: Matrix, indices: list[list[int]], mask: list[bool]) -> float:
    """E * sum_e f_e P_e over the tokens that count."""
    num_experts = len(probs[0])
    counted = [t for t, real in enumerate(mask) if real]
    slots = [e for t in counted for e in indices[t] if e < num_experts]
    total = 0.0
    for e in range(num_experts):
        f = slots.count(e) / len(slots)
        p = sum(probs[t][e] for t in counted) / len(counted)
        total += f * p
    return num_experts * total


def z(logits: Matrix, probs: Matrix, indices: list[list[int]], mask: list[bool]) -> float:
    """Mean of logsumexp(z)^2 over the tokens that count."""
    counted = [row for row, real in zip(logits, mask, strict=True) if real]
    return sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in counted) / len(counted)


ROUTERS: dict[str, Callable[..., Any]] = {"top_k": top_k}
BALANCE_LOSSES: dict[str, Callable[..., float]] = {"switch": switch, "z": z}
