"""Slow and obvious twins of what the package computes: plain Python numbers and loops, one formula a line.

A router or a balance loss that a recipe may name has an oracle of the same name here. Matrices are lists of rows.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

Vector = list[float]
Matrix = list[list[float]]


def matvec(matrix: Matrix, vector: Vector) -> Vector:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


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


def _collected(table: str) -> dict[str, Callable[..., Any]]:
    """All entries of that table in this folder's `oracles_*.py`; a name may occur once."""
    found: dict[str, Callable[..., Any]] = {}
    for path in sorted(Path(__file__).parent.glob("oracles_*.py")):
        entries = getattr(importlib.import_module(f"tests.reference.{path.stem}"), table, {})
        assert not found.keys() & entries.keys(), f"{path.name} repeats {sorted(found.keys() & entries.keys())}"
        found.update(entries)
    return found


ROUTERS: dict[str, Callable[..., Any]] = _collected("ROUTERS")
BALANCE_LOSSES: dict[str, Callable[..., Any]] = _collected("BALANCE_LOSSES")
