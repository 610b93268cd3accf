"""How far the answers are, with the time that is left: one live line in a terminal, plain lines in a log file.

Only the first rank says anything.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

LINE_SECONDS = 10.0  # between lines of a log
DRAW_SECONDS = 0.2  # between drawings in a terminal
CLEAR = "\r\x1b[K"


def as_time(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Meter:
    """One count that goes up; a context manager, as a tqdm bar is.

    Args:
        total: where it ends.
        what: is counted.
        prefix: in front of each line, e.g. "gqa (2 of 11)".
        stream: where to; its `isatty` decides how. None: nowhere.
        clock: seconds.
    """

    def __init__(
        self, total: int, what: str, prefix: str, stream: TextIO | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.done = total, 0
        self._what, self._prefix, self._stream, self._clock = what, prefix, stream, clock
        self._live = stream is not None and stream.isatty()
        self._start = self._said = clock()

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._write(CLEAR)
        if kind is None and self.total:
            self._write(f"{self._prefix}: {self.done} {self._what} in {as_time(self._clock() - self._start)}\n")

    def update(self, number: int = 1) -> None:
        """So many more."""
        self.done += number
        now = self._clock()
        if now - self._said < (DRAW_SECONDS if self._live else LINE_SECONDS):
            return
        self._said = now
        self._write(f"{CLEAR}{self.line()}" if self._live else f"{self.line()}\n")

    def line(self) -> str:
        """What is said now."""
        spent = self._clock() - self._start
        left = "" if not self.done else f", {as_time(spent / self.done * (self.total - self.done))} left"
        pace = "" if not spent else f", {self.done / spent:.3g}/s"
        share = f"{self.done / max(self.total, 1):.0%}"
        return f"{self._prefix}: {self.done}/{self.total} {self._what} ({share}{pace}{left})"

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(text)
            self._stream.flush()


class Progress:
    """Makes the meters of a run; `LlavaMoe(progress=...)` asks for one for each thing that it counts.

    Attributes:
        prefix: of the meters that are made from now on.
    """

    def __init__(self, quiet: bool, stream: TextIO | None = None) -> None:
        self.prefix = ""
        self._quiet = quiet
        self._stream = sys.stderr if stream is None else stream  # now: lmms-eval's noise is redirected later

    def __call__(self, total: int, what: str) -> Meter:
        """A meter."""
        return Meter(total, what, self.prefix, None if self._quiet else self._stream)

    def say(self, text: str) -> None:
        """A plain line."""
        if not self._quiet:
            self._stream.write(f"{text}\n")
            self._stream.flush()
