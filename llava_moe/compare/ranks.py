"""Several processes of one program on this machine, as ranks that find each other; a signal to us reaches all of them.

A launcher would do the same and more: DeepSpeed's ends its ranks half a minute after a SIGTERM, torchrun's starts them
in sessions of their own, where they outlive it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from llava_moe.compare.cells import with_parent

_POLL = 0.2
_PATIENCE = 60.0  # seconds that ranks have to end by themselves after another has failed


def run_ranks(command: Sequence[str], number: int, environment: Mapping[str, str] | None = None) -> int:
    """Runs a command in so many processes and returns the exit code of the first that failed, 0 where none did.

    SIGTERM and SIGINT reach all of them as SIGTERM, which makes a training save; it is then waited for.
    """
    shared = {
        **with_parent(os.environ),
        **(environment or {}),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
    }
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes: list[subprocess.Popen[bytes]] = []
    with _forwarded(processes):
        for rank in range(number):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(list(command), stdin=subprocess.DEVNULL, env=own, process_group=0))
        return _wait(processes)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    failed, until = 0, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        failed = failed or next((code for code in codes if code), 0)
        if None not in codes:
            return failed
        if failed and until == float("inf"):
            until = time.monotonic() + _PATIENCE
        if time.monotonic() > until:
            for process in processes:
                process.kill()
        time.sleep(_POLL)


@contextmanager
def _forwarded(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Within it SIGTERM and SIGINT go to the processes."""

    def forward(number: int, frame: Any) -> None:
        if not processes:
            raise SystemExit(128 + number)  # nobody is there to end
        for process in processes:
            process.send_signal(signal.SIGTERM)  # does nothing where it has ended

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
