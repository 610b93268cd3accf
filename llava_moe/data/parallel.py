"""The same work for many blocks of records, in processes that start without loading everything anew."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

_Block = TypeVar("_Block")
_Result = TypeVar("_Result")


def usable_cores() -> int:
    """Cores that this process may use: a container or a batch system gives fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Work(Dataset[Any]):
    def __init__(self, work: Callable[[Any], Any], blocks: Sequence[Any]) -> None:
        self.work, self.blocks = work, blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Any:
        return self.work(self.blocks[index])


def in_order(work: Callable[[_Block], _Result], blocks: Sequence[_Block], workers: int) -> Iterator[_Result]:
    """`work(block)` for every block, in the order of the blocks.

    Args:
        work: is handed to the processes, so what it remembers of a block is known to one of them.
        blocks: what the work is cut into.
        workers: processes; 0 does it all in this one.

    Yields:
        The results. Not many more blocks are under way than there are workers.
    """
    # torch's loader does what a pool would have to be taught: results in order, and an end to every process when one
    # dies or the user interrupts. A generator of its own, or the run's random numbers would depend on the check.
    loader = DataLoader(
        _Work(work, blocks),
        batch_size=None,
        num_workers=min(workers, len(blocks)),
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )
    yield from loader


def _as_it_is(result: Any) -> Any:
    return result
