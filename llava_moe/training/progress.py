"""Where a run stands, for whoever looks on: one live line in a terminal, plain lines in a log file.

A terminal shows a bar that is drawn anew at every step. Everything else (a file, a pipe, the log of CI or SLURM) gets
lines without control characters, one for a log step, but not more often than every `LINE_SECONDS`, and also one when
nothing has been said for `SILENT_SECONDS`. Only the first rank says anything; `train.disable_tqdm=true` silences it.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

LINE_SECONDS, SILENT_SECONDS = 10.0, 60.0
_DRAW_SECONDS = 0.25
_WINDOW = 50  # steps that the remaining time is reckoned from
_BAR = 16
_Clock = Callable[[], float]


class RemainingTime:
    """The time to the end, from the pace of the last steps; writing checkpoints and scoring are part of it."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._marks: deque[tuple[int, float]] = deque(maxlen=_WINDOW + 1)

    def mark(self, step: int) -> None:
        self._marks.append((step, self._clock()))

    def seconds(self, total: int) -> float | None:
        """Until step `total`; None before there is a pace."""
        (first, since), (last, now) = self._marks[0], self._marks[-1]
        return None if last == first else (now - since) / (last - first) * (total - last)


def parts_of(row: Mapping[str, Any], remaining: float | None) -> list[str]:
    """What is told of a row of metrics, the most important first."""
    told = [f"ETA {as_time(remaining)}"] if remaining else []
    if not row:
        return told
    parts = [f"loss {row['loss']:.4g}", *told, f"{short(row['tokens_per_second'])} tok/s"]
    parts += [f"{row['seconds_per_step']:.3g} s/step"]
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.0%}")
    parts += [f"useful {row['useful_tokens']:.0%}", f"{short(row['samples'])} samples"]
    if row["data_wait_share"] >= 0.01:
        parts.append(f"data wait {row['data_wait_share']:.0%}")
    return parts


def as_time(seconds: float) -> str:
    """12.3 as 0:12, 3700 as 1:01:40, and days where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{rest:02d}" if hours or days else f"{minutes}:{rest:02d}"
    return f"{days}d {clock}" if days else clock


def short(number: float) -> str:
    """950 as 950, 12345 as 12.3k, 5.1e6 as 5.1M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def fitting(parts: list[str], width: int) -> str:
    """As many of the parts as fit side by side."""
    while len(parts) > 1 and len(" · ".join(parts)) > width:
        parts = parts[:-1]
    return " · ".join(parts)


class ProgressCallback(TrainerCallback):  # type: ignore[misc]  # transformers types it as Any
    """Shows the run.

    Args:
        metrics: has the last row of metrics as `row`; it must come before this in the list of callbacks.
        console: what is drawn on; None takes standard output.
        clock: in seconds.
    """

    def __init__(self, metrics: Any, console: Console | None = None, clock: _Clock = time.monotonic) -> None:
        self.metrics = metrics
        self._console = console
        self._clock = clock
        self._shown: _Bar | _Lines | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            console = self._console or Console(file=sys.stdout)
            kind = _Bar if is_live(console) else _Lines
            self._shown = kind(console, state.global_step, state.max_steps, self._clock)
            atexit.register(self.close)  # an error ends the training without a word to callbacks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._shown is not None:
            self._shown.step(state.global_step, self.metrics.row)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._shown is not None and logs and "loss" in logs:
            self._shown.log(state.global_step, self.metrics.row)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._shown is not None:
            self._shown.close()
            self._shown = None
            atexit.unregister(self.close)


def is_live(console: Console) -> bool:
    """Whether lines can be drawn anew: asked of the file itself, as CI may claim colours for what is no terminal."""
    return console.file.isatty() and not console.is_dumb_terminal


def spare_logs() -> None:
    """Silences the bars of transformers (weights read, shards written) where they would be drawn into a log."""
    if not is_live(Console(file=sys.stdout)):
        transformers_logging.disable_progress_bar()


class _Bar:
    """The live line. It is drawn when a step ends, without a thread that would take time from the training."""

    def __init__(self, console: Console, step: int, total: int, clock: _Clock) -> None:
        self._clock, self._total = clock, total
        self._remaining = RemainingTime(clock)
        self._remaining.mark(step)
        self._drawn = 0.0
        columns = (BarColumn(bar_width=_BAR), MofNCompleteColumn(), TextColumn("{task.fields[told]}", markup=False))
        self._bar = Progress(*columns, console=console, auto_refresh=False)
        # bar, count and the spaces between the columns
        self._width = console.width - _BAR - 2 * len(str(total)) - 4
        # those of transformers for each checkpoint would leave their rests above this one
        self._others = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        self._bar.start()
        self._task: TaskID = self._bar.add_task("", total=total, completed=step, told="")
        self._bar.refresh()

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        self._remaining.mark(step)
        now = self._clock()
        if now - self._drawn >= _DRAW_SECONDS or step == self._total:
            self.log(step, row)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        self._drawn = self._clock()
        told = fitting(parts_of(row, self._remaining.seconds(self._total)), self._width)
        self._bar.update(self._task, completed=step, told=told, refresh=True)

    def close(self) -> None:
        self._bar.stop()
        if self._others:
            transformers_logging.enable_progress_bar()


class _Lines:
    """Lines for a log."""

    def __init__(self, console: Console, step: int, total: int, clock: _Clock) -> None:
        self._console, self._clock, self._total = console, clock, total
        self._remaining = RemainingTime(clock)
        self._remaining.mark(step)
        self._said = clock()
        self._first = True

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        self._remaining.mark(step)
        if self._clock() - self._said >= SILENT_SECONDS:
            self._say(step, row)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        if self._first or step == self._total or self._clock() - self._said >= LINE_SECONDS:
            self._first = False
            self._say(step, row)

    def _say(self, step: int, row: Mapping[str, Any]) -> None:
        self._said = self._clock()
        parts = [f"step {step}/{self._total}", *parts_of(row, self._remaining.seconds(self._total))]
        print(", ".join(parts), file=self._console.file, flush=True)

    def close(self) -> None:
        """There is nothing to put back."""
