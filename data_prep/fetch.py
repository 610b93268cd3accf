"""Downloads one file in parallel ranges and goes on after any interruption, SIGKILL included.

`NAME.part` receives the ranges at their places; `NAME.part.json` says which are there. The file gets its name only
when it is whole and its checksum is right. huggingface_hub supplies addresses and log-in for Hub files, but not the
transfer: it gives each attempt a fresh temporary file (1.31 to 2.4 at least), so that an interrupted one is lost.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import requests

from data_prep.errors import InterruptError, PrepareError, explain_os_error, readable
from data_prep.manifest import Upstream

T = TypeVar("T")
_PIECE = 1 << 14  # what a broken connection loses at most
_AGAIN = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Transfer:
    """How to talk to servers.

    Attributes:
        connections: parallel ranges of one file.
        chunk: bytes of a range, the unit in which an interrupted download goes on.
        retries: attempts in a row that may bring nothing before a range is given up.
        backoff: seconds before the second attempt, doubled for each further one.
        timeout: seconds to connect, and between two packets.
    """

    connections: int = 4
    chunk: int = 32 << 20
    retries: int = 6
    backoff: float = 1.0
    timeout: tuple[float, float] = (15.0, 60.0)


@dataclass(frozen=True)
class Remote:
    """What the server says of the file."""

    url: str
    headers: Mapping[str, str]
    size: int | None
    etag: str
    ranges: bool


class _TransientError(RuntimeError):
    """An answer that may be another one in a moment."""


def address(file: Upstream) -> tuple[str, dict[str, str]]:
    """URL and request headers; HF_ENDPOINT and the Hub's log-in are honoured."""
    if file.hub is None:
        return str(file.url), {}
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(file.hub.repo, file.hub.file, repo_type="dataset", revision=file.hub.revision)
    return url, build_hf_headers()


def file_sha256(
    path: Path, advance: Callable[[int], None] = lambda _: None, stop: threading.Event | None = None
) -> str:
    """The hex digest of a file.

    Raises:
        InterruptError: `stop` was set.
    """
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            if stop is not None and stop.is_set():
                raise InterruptError
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def partial_size(target: Path) -> int:
    """Bytes that an interrupted download of `target` has already brought."""
    journal = _Journal.read(target.with_name(f"{target.name}.part.json"))
    return 0 if journal is None else journal.present()


def download(
    file: Upstream,
    target: Path,
    transfer: Transfer,
    *,
    advance: Callable[[int], None] = lambda _: None,
    stop: threading.Event | None = None,
) -> str:
    """Fetches `file` as `target`, or goes on with it.

    Args:
        file: address, size and checksum.
        target: appears only when whole and right.
        transfer: how to talk to the server.
        advance: called with bytes as they arrive (and once with those that were there).
        stop: when set, the download ends soon and keeps what it has.

    Returns:
        The file's sha256.

    Raises:
        PrepareError: the server refuses or has another file, the disk is full, the checksum is wrong.
        InterruptError: `stop` was set.
    """
    stop = stop or threading.Event()
    url, headers = address(file)
    part, notes = (target.with_name(f"{target.name}.part{end}") for end in ("", ".json"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remote = _probe(url, {**headers, "Accept-Encoding": "identity"}, transfer, stop)
        if remote.size not in (None, file.size):
            raise PrepareError(
                f"{file.name}: the server has {remote.size} bytes, the manifest says {file.size}: it is another file "
                f"now; look at {file.page or url}"
            )
        if remote.ranges:
            journal = _Journal.begin(notes, file.size, transfer.chunk, remote.etag, file.known_sha256 is not None)
            advance(journal.present())
            _fetch_ranges(remote, part, journal, transfer, advance, stop)
        else:
            notes.unlink(missing_ok=True)
            _fetch_whole(remote, part, file.size, transfer, advance, stop)
        found = file_sha256(part, stop=stop)
        if file.known_sha256 not in (None, found):
            part.unlink()
            notes.unlink(missing_ok=True)
            raise PrepareError(
                f"{file.name}: wrong checksum: sha256 {found}, expected {file.sha256}; the download was thrown away. "
                f"Run again; if it stays wrong, the file at {url} is not the one that the manifest means"
            )
        os.replace(part, target)
        notes.unlink(missing_ok=True)
    except OSError as error:
        raise explain_os_error(error, target, "downloading") from error
    return found


def _probe(url: str, headers: Mapping[str, str], transfer: Transfer, stop: threading.Event) -> Remote:
    """Asks for the first byte: several of these servers answer HEAD differently, signed addresses not at all."""

    def ask(session: requests.Session) -> Remote:
        with _get(session, url, {**headers, "Range": "bytes=0-0"}, transfer) as response:
            etag = response.headers.get("ETag", "")
            etag = "" if etag.startswith("W/") else etag
            if response.status_code == 206:
                return Remote(url, headers, _total(response), etag, True)
            length = response.headers.get("Content-Length")
            return Remote(url, headers, None if length is None else int(length), etag, False)

    with requests.Session() as session:
        return _persist(url, lambda: ask(session), transfer, stop)


def _persist(
    url: str,
    attempt: Callable[[], T],
    transfer: Transfer,
    stop: threading.Event,
    position: Callable[[], int] = lambda: 0,
) -> T:
    """Repeats what failed for a passing reason, with growing pauses; what moved `position` is not counted."""
    failures = 0
    while True:
        if stop.is_set():
            raise InterruptError
        before = position()
        try:
            return attempt()
        except (requests.RequestException, _TransientError) as error:
            failures = 1 if position() > before else failures + 1
            if failures > transfer.retries:
                reason = " ".join(str(error).split())[:300]
                raise PrepareError(f"{url}: {reason}; run again later, it goes on where it stood") from error
            stop.wait(transfer.backoff * 2 ** (failures - 1))


@contextmanager
def _get(
    session: requests.Session, url: str, headers: Mapping[str, str], transfer: Transfer
) -> Iterator[requests.Response]:
    """A streamed answer that has a body we want.

    Raises:
        PrepareError: the server refuses.
        _TransientError: it may not refuse in a moment.
    """
    with session.get(url, headers=dict(headers), stream=True, timeout=transfer.timeout) as response:
        if response.status_code in _AGAIN:
            raise _TransientError(f"the server answers {response.status_code} {response.reason}")
        if response.status_code not in (200, 206):
            mend = "; log in with `hf auth login` or set HF_TOKEN" if response.status_code in (401, 403) else ""
            raise PrepareError(f"{url}: the server answers {response.status_code} {response.reason}{mend}")
        yield response


def _total(response: requests.Response) -> int | None:
    """The size of the whole file, from `Content-Range: bytes 0-0/1234`."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else None


class _Journal:
    """Which chunks of a partial file are there.

    A chunk is noted after it was written, and the note replaces the former one in one step. A process may thus be
    killed at any moment; after a power cut the checksum of the whole file has the last word.
    """

    def __init__(self, path: Path, size: int, chunk: int, etag: str, done: set[int]) -> None:
        self.path, self.size, self.chunk, self.etag, self.done = path, size, chunk, etag, done
        self._lock = threading.Lock()

    @classmethod
    def read(cls, path: Path) -> _Journal | None:
        """The journal of an earlier run, if there is a readable one."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, int(raw["size"]), int(raw["chunk"]), str(raw["etag"]), {int(i) for i in raw["done"]})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @classmethod
    def begin(cls, path: Path, size: int, chunk: int, etag: str, checked: bool) -> _Journal:
        """Goes on with an earlier run if it had the same file, otherwise starts anew.

        The same size is enough where a checksum decides in the end: servers behind one name give one file several tags.
        """
        old = cls.read(path)
        part = path.with_suffix("")
        if old is not None and old.size == size and (checked or (etag != "" and old.etag == etag)):
            reaches = max((old.span(index)[1] for index in old.done), default=0)
            if part.is_file() and part.stat().st_size >= reaches:
                return old
        part.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        return cls(path, size, chunk, etag, set())

    def span(self, index: int) -> tuple[int, int]:
        """First byte, and the one behind the last."""
        return index * self.chunk, min((index + 1) * self.chunk, self.size)

    def missing(self) -> list[int]:
        """The chunks that are still to be fetched."""
        return [index for index in range(-(-self.size // self.chunk)) if index not in self.done]

    def present(self) -> int:
        """Bytes in the chunks that are there."""
        return sum(end - begin for begin, end in map(self.span, self.done))

    def note(self, index: int) -> None:
        """Writes down that a chunk is there."""
        with self._lock:
            self.done.add(index)
            raw = {"size": self.size, "chunk": self.chunk, "etag": self.etag, "done": sorted(self.done)}
            fresh = self.path.with_name(f"{self.path.name}.new")
            fresh.write_text(json.dumps(raw), encoding="utf-8")
            os.replace(fresh, self.path)


def _fetch_ranges(
    remote: Remote,
    part: Path,
    journal: _Journal,
    transfer: Transfer,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in journal.missing():
        todo.put(index)
    failed = threading.Event()  # one range that cannot be had ends the others

    def work(handle: int) -> None:
        with requests.Session() as session:
            while not (failed.is_set() or stop.is_set()):
                try:
                    index = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    _fetch_span(session, remote, handle, journal.span(index), journal.size, transfer, advance, stop)
                    journal.note(index)
                except BaseException:
                    failed.set()
                    raise

    handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with ThreadPoolExecutor(transfer.connections) as pool:
            for future in [pool.submit(work, handle) for _ in range(transfer.connections)]:
                future.result()
    finally:
        os.close(handle)
    if stop.is_set() and journal.missing():
        raise InterruptError


def _fetch_span(
    session: requests.Session,
    remote: Remote,
    handle: int,
    span: tuple[int, int],
    size: int,
    transfer: Transfer,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """One range, to its place in the file. A connection that breaks within it costs a piece."""
    position, end = span

    def attempt() -> None:
        while position < end:
            before = position
            request()
            if position == before:
                raise _TransientError("the server sent nothing")

    def request() -> None:
        nonlocal position
        headers = {**remote.headers, "Range": f"bytes={position}-{end - 1}"}
        with _get(session, remote.url, headers, transfer) as response:
            if response.status_code != 206 or _total(response) != size:
                raise PrepareError(f"{remote.url}: the file changed on the server while it was fetched; run again")
            for piece in response.iter_content(_PIECE):
                if stop.is_set():
                    raise InterruptError
                wanted = memoryview(piece)[: end - position]
                while wanted:
                    written = os.pwrite(handle, wanted, position)
                    position += written
                    advance(written)
                    wanted = wanted[written:]

    _persist(remote.url, attempt, transfer, stop, lambda: position)


def _fetch_whole(
    remote: Remote,
    part: Path,
    size: int,
    transfer: Transfer,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """For a server without ranges: from the beginning, and again from the beginning after a break."""

    def attempt() -> None:
        received = 0
        try:
            with (
                requests.Session() as session,
                _get(session, remote.url, remote.headers, transfer) as response,
                part.open("wb") as handle,
            ):
                for piece in response.iter_content(_PIECE):
                    if stop.is_set():
                        raise InterruptError
                    handle.write(piece)
                    received += len(piece)
                    advance(len(piece))
            if received != size:
                raise _TransientError(f"{readable(received)} arrived of {readable(size)}")
        except (requests.RequestException, _TransientError):
            advance(-received)
            raise

    _persist(remote.url, attempt, transfer, stop)
