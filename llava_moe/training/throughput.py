"""What the steps of a run worked on, and how long they took: tokens, samples, pictures, and the wait for data.

Everything on the device is summed there; the host reads it once for each log line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llava_moe.data.conversation import IGNORE_INDEX
from llava_moe.data.packing import PADDING

WAIT_SHARE, WAIT_STEPS = 0.1, 50
"""The warning: more than this share of the time of at least so many steps was spent waiting for data."""


@dataclass(frozen=True)
class Counts:
    """What went through the model.

    Attributes:
        tokens: real ones, placeholders of pictures included.
        places: tokens and padding.
        pairs: of a token and one that it attends to in its own sample, itself included.
        labels: tokens whose prediction is in the loss.
        samples: of the data set; a pack holds several.
        pictures: pictures or tiles that went through the tower; the blank one of a batch without any is left out.
        features: pictures whose features came from the cache, so that only the projector worked on them.
    """

    tokens: int = 0
    places: int = 0
    pairs: int = 0
    labels: int = 0
    samples: int = 0
    pictures: int = 0
    features: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def count(inputs: Mapping[str, Any], image_token_id: int) -> Tensor:
    """The values of `Counts` for one micro-batch, packed or not: (7,) int64 on its device, without waiting for it."""
    ids = inputs["input_ids"]
    if "sequence_ids" in inputs:
        real = inputs["sequence_ids"] != PADDING
        position = inputs["position_ids"]
        pairs = ((position + 1) * real).sum()
        samples = ((position == 0) & real).sum()
    else:
        real = inputs["attention_mask"].bool()
        length = real.sum(-1)
        pairs = (length * (length + 1)).sum() // 2
        samples = _scalar(ids.shape[0], ids.device)
    has_pictures = (ids == image_token_id).any()
    shown = [inputs[key].shape[0] if inputs.get(key) is not None else 0 for key in ("pixel_values", "vision_features")]
    return torch.stack(
        [
            real.sum(),
            _scalar(ids.numel(), ids.device),
            pairs,
            (inputs["labels"][:, 1:] != IGNORE_INDEX).sum(),
            samples,
            *(_scalar(number, ids.device) * has_pictures for number in shown),
        ]
    )


def _scalar(value: int, device: torch.device) -> Tensor:
    # filled on the device; torch.tensor(value, device=...) would copy from the host and wait for that
    return torch.full((), value, dtype=torch.int64, device=device)


class StepCounts:
    """Sums over micro-batches on the device, until they are drained."""

    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id
        self._sums: Tensor | None = None

    @torch.no_grad()
    def update(self, inputs: Mapping[str, Any]) -> None:
        """Takes one micro-batch."""
        counted = count(inputs, self.image_token_id)
        self._sums = counted if self._sums is None else self._sums + counted

    def drain(self) -> Counts:
        """The sums over micro-batches and ranks since the last call; every rank must call it."""
        if self._sums is None:
            return Counts()
        sums, self._sums = self._sums, None
        if dist.is_initialized():
            dist.all_reduce(sums)
        return Counts(*sums.tolist())


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each value over all ranks; every rank must call it."""
    if not dist.is_initialized():
        return list(values)
    found = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


@dataclass(frozen=True)
class Lap:
    """One log interval of this rank.

    Attributes:
        steps: optimiser steps.
        seconds: of training; the pauses are not among them.
        pause: seconds in which checkpoints were written or the model was scored.
        wait: seconds that the host waited for the loader. Where it runs ahead of a GPU, the GPU waited less.
    """

    steps: int
    seconds: float
    pause: float
    wait: float


class Stopwatch:
    """Times log intervals on the host, and apart from them the wait for data and what is no training."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.start(0)

    def start(self, step: int) -> None:
        """Begins an interval after this step."""
        self._step, self._since = step, self._clock()
        self._marked, self._pause, self._wait = self._since, 0.0, 0.0

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; what the consumer waits for them is counted."""
        while True:
            asked = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._wait += self._clock() - asked
            yield batch

    def mark(self) -> None:
        """Up to now it was training."""
        self._marked = self._clock()

    def paused(self) -> None:
        """What has passed since the last mark was no training."""
        now = self._clock()
        self._pause += now - self._marked
        self._marked = now

    def lap(self, step: int) -> Lap:
        """Ends the interval at this step and begins the next."""
        seconds = self._clock() - self._since - self._pause
        lap = Lap(max(step - self._step, 1), max(seconds, 1e-9), self._pause, self._wait)
        self.start(step)
        return lap


class WaitWarning:
    """Says once that training waits for its data, with what helps.

    Args:
        num_workers: processes that load data on this rank.
        may_cache: whether `data.feature_cache` could spare decoding and the tower.
    """

    def __init__(self, num_workers: int, may_cache: bool) -> None:
        self.num_workers = num_workers
        self.may_cache = may_cache
        self._steps, self._seconds, self._wait, self._said = 0, 0.0, 0.0, False

    def add(self, steps: int, seconds: float, wait: float) -> str | None:
        """Takes one log interval; a line to print when at least `WAIT_STEPS` steps have waited too long."""
        self._steps, self._seconds, self._wait = self._steps + steps, self._seconds + seconds, self._wait + wait
        if self._steps < WAIT_STEPS:
            return None
        told, share = None, self._wait / self._seconds
        if share > WAIT_SHARE and not self._said:
            self._said = True
            advice = f"raise train.dataloader_num_workers (now {self.num_workers})"
            if self.may_cache:
                advice += ", or name a data.feature_cache: the tower is frozen, so its features can be kept"
            told = (
                f"train: steps wait {share:.0%} of their time for data ({self._wait / self._steps:.3g} of "
                f"{self._seconds / self._steps:.3g} s over the last {self._steps} steps); {advice}"
            )
        self._steps, self._seconds, self._wait = 0, 0.0, 0.0
        return told
