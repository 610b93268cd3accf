"""Requests to stop, and ranks that are gone.

A run is asked to stop by SIGTERM or SIGUSR1 to any of its ranks, by the file `<output_dir>/stop`, or by the file that
LLAVA_MOE_STOP_FILE names (scripts/common.sh makes it, because DeepSpeed's launcher would kill the ranks half a minute
after a SIGTERM). The ranks agree at the end of a step, save, and leave with exit code 75 (EX_TEMPFAIL: try again).

A rank that waits for a dead one in a collective may wait for half an hour, and on a GPU it does so where no Python
signal handler ever runs. So a thread looks after the other ranks of this machine and ends the process when one is gone.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_moe.training import distributed

FILE = "stop"
STOP_FILE_VARIABLE = "LLAVA_MOE_STOP_FILE"
STOPPED = 75
PEER_GONE = 70
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOOK_EVERY = 2.0  # seconds between two looks at the other ranks
_LAUNCHER_LOOKS = 2.0  # seconds; DeepSpeed's looks at its ranks every second
_TRANSPORT = ("gloo", "Gloo", "NCCL", "onnection", "TCPStore")  # in errors of torch.distributed
_PATIENCE = 8.0  # seconds in which a rank may still say itself why it ends, after another one has gone


class Interrupted(SystemExit):  # not an error
    """The run has saved and leaves; its exit code says that it can be started again.

    Args:
        message: for the user.
        agreed: all ranks are here; otherwise the launcher ends the others.
    """

    def __init__(self, message: str, agreed: bool = False) -> None:
        super().__init__(STOPPED)
        self.message = message
        self.agreed = agreed


@dataclass(frozen=True)
class Peer:
    """Another rank on this machine."""

    rank: int
    pid: int

    def is_gone(self) -> bool:
        """Whether its process has ended; a zombie that nobody has waited for counts as ended."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        with contextlib.suppress(OSError, IndexError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return False


def peers() -> list[Peer]:
    """The other ranks that this one can see; every rank must call it."""
    place = (_machine(), os.getppid())
    every = distributed.gather((distributed.rank(), os.getpid(), place))
    return [Peer(rank, pid) for rank, pid, where in every if where == place and pid != os.getpid()]


def _machine() -> tuple[str, ...]:
    """Tells machines, and containers on one, apart: host names may be the same on all nodes."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return tuple(os.uname())


class StopRequest:
    """Whether the run was asked to stop. Between `entered` and the end of its `with` signals do not end the process.

    Args:
        output_dir: of the run.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.training = False  # before the first step there is nothing to save, and a signal ends the run at once
        self._asked = False
        self._has_raised = False
        self.files = [Path(output_dir) / FILE]
        if os.environ.get(STOP_FILE_VARIABLE):
            self.files.append(Path(os.environ[STOP_FILE_VARIABLE]))
        self._peers: list[Peer] = []
        self._closed = threading.Event()

    @property
    def is_asked(self) -> bool:
        """What this rank knows; only rank 0 looks at files."""
        return self._asked or (distributed.rank() == 0 and any(file.exists() for file in self.files))

    def forget(self) -> None:
        """Removes the request's files, once it was heeded or the run is over; rank 0 calls it."""
        for file in self.files:
            file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Takes over the signals and looks after the other ranks.

        Outside the main thread Python allows no signal handlers; there only the file works.
        """
        if distributed.rank() == 0:
            self.files[0].unlink(missing_ok=True)  # for an earlier run; the other file is of this start
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        reader, writer = os.pipe()
        for end in (reader, writer):
            os.set_blocking(end, False)
        earlier = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(reader,), name="llava-moe-watcher", daemon=True)
        watcher.start()
        try:
            yield self
        finally:
            self._closed.set()
            signal.set_wakeup_fd(earlier)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            with contextlib.suppress(OSError):
                os.write(writer, b"\0")
            watcher.join(timeout=5)
            os.close(reader)
            os.close(writer)

    def look_after_peers(self) -> None:
        """From now on; every rank must call it, and leave `listening` together with the others."""
        self._peers = peers()

    def peer_gone(self, seconds: float = 0.0) -> Peer | None:
        """The first of the other ranks here that has ended, waiting so long for one to end."""
        until = time.monotonic() + seconds
        while True:
            gone = next((peer for peer in self._peers if peer.is_gone()), None)
            if gone is not None or time.monotonic() >= until:
                return gone
            time.sleep(0.1)

    @contextlib.contextmanager
    def naming_who_is_gone(self) -> Iterator[None]:
        """Within it a communication that failed because another rank here has ended becomes one line that names it.

        Raises:
            SystemExit: with the code 70, in the place of that error.
        """
        try:
            yield
        except RuntimeError as error:
            gone = self.peer_gone(seconds=3.0) if any(word in str(error) for word in _TRANSPORT) else None
            if gone is None:
                raise
            tell_gone(gone)
            time.sleep(_LAUNCHER_LOOKS)  # launchers report the first rank that they find dead: not this one
            raise SystemExit(PEER_GONE) from error

    def _on_signal(self, number: int, frame: Any) -> None:
        self._asked = True
        if not self.training and not self._has_raised:
            self._has_raised = True
            raise Interrupted("stopped before the first step; nothing was lost")

    def _watch(self, reader: int) -> None:
        """The thread. It runs also while the main thread waits for a device or another rank."""
        while not self._closed.is_set():
            ready, _, _ = select.select([reader], [], [], _LOOK_EVERY)
            if ready and not self._closed.is_set():
                with contextlib.suppress(OSError):
                    self._asked = self._asked or any(n in SIGNALS for n in os.read(reader, 64))
            if self.is_asked and not (self.training or self._has_raised or self._closed.is_set()):
                os.kill(os.getpid(), signal.SIGTERM)  # by a file, and the main thread is busy before its first step
            gone = self.peer_gone()
            if gone is None or self._closed.wait(_PATIENCE):
                continue
            tell_gone(gone)
            os._exit(PEER_GONE)


def tell_gone(peer: Peer) -> None:
    """The reason why this rank ends."""
    print(
        f"error: rank {peer.rank} (process {peer.pid}) is gone, and rank {distributed.rank()} cannot go on without it; "
        f"what it said or what its launcher says of it is the cause",
        file=sys.stderr,
        flush=True,
    )


def ignore_in_worker() -> None:
    """For a data worker: whoever signals all processes of a job at once must not take the batches of the last step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
