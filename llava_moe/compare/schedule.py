"""Runs the cells of a matrix, some at a time, each in a process of its own that a failure stays in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llava_moe.compare.cells import LOG, STATE, last_lines, state_of, with_parent
from llava_moe.compare.devices import cores
from llava_moe.compare.matrix import Cell
from llava_moe.compare.report import Failure

_POLL = 0.2
_EVERY = 30.0  # seconds between progress lines while nothing ends
_GRACE = 60.0  # seconds that a cell has to save when the matrix is stopped
Command = Callable[[Cell], list[str]]


def cell_command(cell: Cell) -> list[str]:
    """The process of a cell."""
    return [sys.executable, "-m", "llava_moe.cell", "cell", str(cell.folder)]


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    began: float


class Schedule:
    """Cells that are to be done, and the slots that they run in.

    The first cell runs alone until its training has begun: what all share and the first one makes (the features of a
    frozen tower) is made once. Where it fails before, the next one takes its place.

    Args:
        cells: in the order in which they start.
        jobs: slots.
        devices: names of GPUs, dealt out to the slots; None on a CPU, whose threads are divided among the processes.
        ranks: processes of a cell, each with one of the devices.
        finished: cells that are done already, for the progress line.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        jobs: int,
        devices: Sequence[str] | None,
        finished: int = 0,
        ranks: int = 1,
        command: Command = cell_command,
    ) -> None:
        self.waiting, self.total, self.done = list(cells), finished + len(cells), finished
        self.jobs, self.devices, self.ranks, self.command = jobs, devices, ranks, command
        self.running: list[_Running] = []
        self.failures: list[Failure] = []
        self._took: list[float] = []
        self._shared = False  # what the cells share has been made

    def run(self) -> list[Failure]:
        """Runs all cells; a failed one is told and the others go on.

        Raises:
            SystemExit: asked to stop by SIGTERM or SIGINT; the cells were told to save, and have ended.
        """
        with self._stopping():
            told = time.monotonic()
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.jobs and self._may_start():
                    self._start(self.waiting.pop(0))
                    told = self._tell(f"{self.running[-1].cell.name}: started")
                for ended in [one for one in self.running if one.process.poll() is not None]:
                    self._end(ended)
                    told = time.monotonic()
                if time.monotonic() - told > _EVERY:
                    told = self._tell(", ".join(f"{one.cell.name}: {state_of(one.cell)}" for one in self.running))
                time.sleep(_POLL)
        return self.failures

    def remaining(self) -> float | None:
        """Seconds left, by the mean of the cells that have ended here; None before the first."""
        if not self._took:
            return None
        mean, now = sum(self._took) / len(self._took), time.monotonic()
        left = len(self.waiting) * mean + sum(max(0.0, mean - (now - one.began)) for one in self.running)
        return left / min(self.jobs, max(1, len(self.waiting) + len(self.running)))

    def _may_start(self) -> bool:
        self._shared = self._shared or any((one.cell.run / "start.json").is_file() for one in self.running)
        return self._shared or not self.running

    def _start(self, cell: Cell) -> None:
        slot = min(set(range(self.jobs)) - {one.slot for one in self.running})
        (cell.folder / STATE).unlink(missing_ok=True)  # of an earlier process
        with (cell.folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                self.command(cell),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(slot),
                start_new_session=True,  # Ctrl-C comes to us, and we ask the cells to save
            )
        self.running.append(_Running(cell, process, slot, time.monotonic()))

    def environment(self, slot: int) -> dict[str, str]:
        """Of the cell in a slot: its devices, or its share of the threads."""
        found = {**with_parent(os.environ), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        for name in ("DRY_RUN", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NPROC"):  # a cell is one process
            found.pop(name, None)
        if self.devices is not None:
            own = self.devices[slot * self.ranks : (slot + 1) * self.ranks]
            return {**found, "CUDA_VISIBLE_DEVICES": ",".join(own)}
        return {**found, "OMP_NUM_THREADS": str(max(1, cores() // (self.jobs * self.ranks)))}

    def _end(self, ended: _Running) -> None:
        self.running.remove(ended)
        cell, seconds = ended.cell, time.monotonic() - ended.began
        if ended.process.returncode == 0:
            self.done += 1
            self._took.append(seconds)
            self._tell(f"{cell.name}: done in {seconds:.0f} s")
            return
        log = last_lines(cell)
        self.failures.append(Failure(cell.method, cell.seed, state_of(cell), log or "(nothing was printed)"))
        code = f"exit code {ended.process.returncode}"
        self._tell(f"{cell.name}: FAILED at {state_of(cell)} after {seconds:.0f} s ({code}); {cell.folder / LOG} ends:")
        print("".join(f"    {line}\n" for line in log.splitlines()), end="", flush=True)

    def _tell(self, text: str) -> float:
        left = self.remaining()
        eta = "" if left is None else f", about {_duration(left)} left"
        failed = f", {len(self.failures)} failed" if self.failures else ""
        print(f"compare: {time.strftime('%H:%M:%S')} {self.done}/{self.total}{failed}{eta} | {text}", flush=True)
        return time.monotonic()

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Within it SIGTERM and SIGINT ask the cells to save, wait for them, and leave with the signal's exit code."""

        def stop(number: int, frame: Any) -> None:
            raise SystemExit(75 if number == signal.SIGTERM else 130)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except BaseException:
            for number in before:
                signal.signal(number, signal.SIG_IGN)
            self._stop_cells()
            self._tell("stopped; start it again to go on")
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_cells(self) -> None:
        for one in self.running:
            one.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + _GRACE
        for one in self.running:
            try:
                one.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.process.kill()
                one.process.wait()


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "1 min"
