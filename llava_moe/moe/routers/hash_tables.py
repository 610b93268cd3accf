"""The fixed tables of the hash router. Shapes: V rows, T tokens, E experts, K slots of a token."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from llava_moe.registry import near_misses

BY = ("token", "position")
TABLES = ("random", "modulo", "balanced")
DEFAULT_ROWS = 65536


def num_rows(by: str, table: str, rows: int | None, frequencies: Sequence[float] | None) -> int:
    """The number of rows for token ids that the options of `HashRouter` ask for.

    Raises:
        ValueError: a name is unknown, they contradict each other, or a number is refused.
    """
    for key, name, known in (("by", by, BY), ("table", table, TABLES)):
        if name not in known:
            raise ValueError(f"hash router: unknown {key} {name!r}; {near_misses(name, list(known))}")
    if by == "position":
        if table != "random" or rows is not None or frequencies is not None:
            raise ValueError("hash router: table, rows and frequencies are for by='token'; by='position' sees no ids")
        return 1  # not 0: tensors without elements look like one shared tensor to what saves a checkpoint
    if (table == "balanced") != (frequencies is not None):
        raise ValueError(f"hash router: table={table!r}: the table balanced needs frequencies, and only it takes them")
    if frequencies is None:
        if rows is not None and rows < 1:
            raise ValueError(f"hash router: rows={rows} must be at least 1")
        return DEFAULT_ROWS if rows is None else rows
    if not frequencies or min(frequencies) < 0:
        raise ValueError("hash router: frequencies must be a number of at least 0 for each id")
    if rows not in (None, len(frequencies)):
        raise ValueError(f"hash router: rows={rows} must be the {len(frequencies)} of the frequencies, or null")
    return len(frequencies)


def random_table(rows: int, k: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """int64 (V, K): k distinct experts for each row, drawn independently."""
    draw_VE = torch.rand(rows, num_experts, generator=generator, dtype=torch.float32, device="cpu")
    return draw_VE.topk(k, dim=-1).indices


def modulo_table(rows: int, k: int, num_experts: int) -> Tensor:
    """int64 (V, K): row v goes to the experts v, v + 1, ... modulo E, so each has equally many rows."""
    row_V1 = torch.arange(rows, device="cpu").unsqueeze(-1)
    return (row_V1 + torch.arange(k, device="cpu")) % num_experts


def shuffled_table(rows: int, k: int, num_experts: int, generator: torch.Generator) -> Tensor:
    """int64 (V, K): `modulo_table` with its rows in random order."""
    order_V = torch.randperm(rows, generator=generator, device="cpu")
    return modulo_table(rows, k, num_experts)[order_V]


def balanced_table(frequencies: Sequence[float], k: int, num_experts: int) -> Tensor:
    """int64 (V, K): the most frequent row first, each to the k experts with the least load so far.

    With k = 1 the loads, as sums of frequencies, differ by at most the largest frequency.
    """
    loads = [(0.0, expert) for expert in range(num_experts)]
    rows = [[0] * k for _ in frequencies]
    for row in sorted(range(len(frequencies)), key=lambda v: -frequencies[v]):
        least = [heapq.heappop(loads) for _ in range(k)]
        rows[row] = [expert for _, expert in least]
        for load, expert in least:
            heapq.heappush(loads, (load + frequencies[row], expert))
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def place_in_sequence(sequence_T: Tensor, counted_T: Tensor) -> Tensor:
    """int64 (T,): how many counted tokens of the same sequence come before each token.

    The tokens of a sequence lie next to each other.
    """
    if not counted_T.shape[0]:
        return sequence_T
    before_T = counted_T.cumsum(0) - counted_T.long()
    first_T = torch.ones_like(counted_T)
    first_T[1:] = sequence_T[1:] != sequence_T[:-1]
    # The count before each sequence began; it never falls, so the latest one is the largest.
    return before_T - torch.where(first_T, before_T, 0).cummax(0).values
