"""How far a long pass over the data is: a bar in a terminal, now and then a line anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS = 30.0
"""Between two lines."""


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to be told (done, in all) as often as one likes; writes to stderr.

    The bar appears with the first call and not before: a thread draws it, and worker processes should be forked while
    there is no such thread.
    """
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    task = bar.add_task("", total=None)
    began = said = time.monotonic()

    def told(done: int, total: int) -> None:
        nonlocal said
        if console.is_terminal:
            bar.start()
            bar.update(task, completed=done, total=total)
            return
        now = time.monotonic()
        if now - said >= _SECONDS:
            said = now
            console.print(f"{what}: {done:,} of {total:,}, {done / (now - began):,.0f} in a second", highlight=False)

    try:
        yield told
    finally:
        if bar.live.is_started:
            bar.stop()
