"""Downloads from a server on loopback: ranges, breaks, kills, refusals, full disks, wrong bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep import fetch
from data_prep.errors import InterruptError, PrepareError
from data_prep.fetch import Transfer, download, partial_size
from data_prep.manifest import UNKNOWN, Upstream
from tests.data_prep.server import Host, serving

REPO = Path(__file__).parents[2]
CONTENT = random.Random(0).randbytes(300_001)
CHUNK = 32_000
FAST = Transfer(connections=3, chunk=CHUNK, retries=3, backoff=0.01, timeout=(5, 5))


@pytest.fixture
def host() -> Iterator[Host]:
    with serving(Host({"/images.zip": CONTENT})) as running:
        yield running


def file_of(host: Host, sha256: str | None = None, size: int = len(CONTENT), path: str = "/images.zip") -> Upstream:
    sha256 = sha256 or hashlib.sha256(CONTENT).hexdigest()
    return Upstream("thing", size, sha256, "none", url=host.url + path)


def test_ranges_in_parallel_make_the_whole_file(host: Host, tmp_path: Path) -> None:
    seen: list[int] = []
    sha256 = download(file_of(host), tmp_path / "new/images.zip", FAST, advance=seen.append)
    assert (tmp_path / "new/images.zip").read_bytes() == CONTENT
    assert sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert sum(seen) == len(CONTENT)
    spans = sorted(int(r.removeprefix("bytes=").partition("-")[0]) for _, r in host.requests[1:] if r)
    assert spans == list(range(0, len(CONTENT), CHUNK))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["images.zip"]


def test_broken_connections_go_on_where_they_broke(host: Host, tmp_path: Path) -> None:
    host.break_after, host.breaks = 20_000, 8
    download(file_of(host), tmp_path / "f", FAST)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert host.breaks == 0
    assert host.served <= len(CONTENT) + 1 + 8 * (20_000 - 16_384)  # a broken connection loses its last piece


def test_a_server_that_sends_nothing_is_given_up(host: Host, tmp_path: Path) -> None:
    host.break_after, host.breaks = 0, 1000
    with pytest.raises(PrepareError, match="run again later, it goes on where it stood"):
        download(file_of(host), tmp_path / "f", FAST)
    assert not (tmp_path / "f").exists()


def test_a_busy_server_is_asked_again(host: Host, tmp_path: Path) -> None:
    host.busy = 3
    download(file_of(host), tmp_path / "f", FAST)
    assert (tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("known", [True, False])
def test_an_interrupted_download_goes_on(host: Host, tmp_path: Path, known: bool) -> None:
    file = file_of(host, None if known else UNKNOWN)
    stop = threading.Event()
    got = 0

    def advance(amount: int) -> None:
        nonlocal got
        got += amount
        if got > 100_000:
            stop.set()

    host.delay = 0.002
    with pytest.raises(InterruptError):
        download(file, tmp_path / "f", FAST, advance=advance, stop=stop)
    there = partial_size(tmp_path / "f")
    assert 0 < there < len(CONTENT)
    assert not (tmp_path / "f").exists()

    host.served = 0
    first: list[int] = []
    download(file, tmp_path / "f", FAST, advance=first.append)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert first[0] == there
    assert host.served == len(CONTENT) - there + 1
    assert partial_size(tmp_path / "f") == 0


def test_a_killed_download_goes_on(host: Host, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from data_prep.fetch import *; from data_prep.manifest import Upstream;"
        "size, sha, url, target = sys.argv[1:];"
        f"download(Upstream('thing', int(size), sha, 'none', url=url), Path(target), Transfer(2, {CHUNK}))"
    )
    file, target = file_of(host), tmp_path / "f"
    host.delay = 0.05
    command = [sys.executable, "-c", program, str(file.size), file.sha256, str(file.url), str(target)]
    process = subprocess.Popen(command, cwd=REPO)
    deadline = time.monotonic() + 30
    while partial_size(target) < 2 * CHUNK and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = partial_size(target)
    assert 2 * CHUNK <= there < len(CONTENT)
    time.sleep(0.2)  # what the server still has under way to the dead process
    host.delay, host.served = 0.0, 0
    download(file, target, FAST)
    assert target.read_bytes() == CONTENT
    assert host.served <= len(CONTENT) - there + 1


def test_another_tag_starts_anew_where_no_checksum_decides(host: Host, tmp_path: Path) -> None:
    for known, fetched_again in ((True, False), (False, True)):
        part = tmp_path / "f.part"
        part.write_bytes(CONTENT[:CHUNK])
        notes = {"size": len(CONTENT), "chunk": CHUNK, "etag": '"old"', "done": [0]}
        (tmp_path / "f.part.json").write_text(json.dumps(notes))
        host.served = 0
        download(file_of(host, None if known else UNKNOWN), tmp_path / "f", FAST)
        assert (tmp_path / "f").read_bytes() == CONTENT
        assert (host.served > len(CONTENT)) == fetched_again


def test_a_part_that_lost_its_end_starts_anew(host: Host, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT[: CHUNK - 1])
    notes = {"size": len(CONTENT), "chunk": CHUNK, "etag": '"one"', "done": [0]}
    (tmp_path / "f.part.json").write_text(json.dumps(notes))
    download(file_of(host, UNKNOWN), tmp_path / "f", FAST)
    assert (tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("notes", ["", "{}", "[1]", '{"size": 5, "chunk": 5, "etag": "x", "done": [0]}'])
def test_notes_that_do_not_fit_start_anew(host: Host, tmp_path: Path, notes: str) -> None:
    (tmp_path / "f.part").write_bytes(b"something else")
    (tmp_path / "f.part.json").write_text(notes)
    download(file_of(host), tmp_path / "f", FAST)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(host: Host, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"thing: wrong checksum: sha256 [0-9a-f]{64}, expected 0{64}; .* Run again"):
        download(file_of(host, "0" * 64), tmp_path / "f", FAST)
    assert list(tmp_path.iterdir()) == []


def test_damage_on_the_disk_is_found(host: Host, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"\0" * CHUNK)
    notes = {"size": len(CONTENT), "chunk": CHUNK, "etag": '"one"', "done": [0]}
    (tmp_path / "f.part.json").write_text(json.dumps(notes))
    with pytest.raises(PrepareError, match="wrong checksum"):
        download(file_of(host), tmp_path / "f", FAST)
    download(file_of(host), tmp_path / "f", FAST)  # and the next run has a fresh start
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_another_size_is_another_file(host: Host, tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=f"the server has {len(CONTENT)} bytes, the manifest says 7: it is another"):
        download(file_of(host, size=7), tmp_path / "f", FAST)
    assert len(host.requests) == 1


def test_a_file_that_changes_under_way(host: Host, tmp_path: Path) -> None:
    host.delay = 0.002

    def change(_: int) -> None:
        host.files["/images.zip"] = CONTENT + b"more"

    with pytest.raises(PrepareError, match="the file changed on the server while it was fetched"):
        download(file_of(host), tmp_path / "f", Transfer(1, CHUNK, 3, 0.01), advance=change)


@pytest.mark.parametrize("path", ["/gone.zip"])
def test_a_refusal_is_final(host: Host, tmp_path: Path, path: str) -> None:
    with pytest.raises(PrepareError, match=r"/gone\.zip: the server answers 404 Not Found"):
        download(file_of(host, path=path), tmp_path / "f", FAST)
    assert len(host.requests) == 1


def test_nobody_listens(tmp_path: Path) -> None:
    with serving(Host()) as host:
        pass
    with pytest.raises(PrepareError, match="run again later"):
        download(file_of(host), tmp_path / "f", Transfer(retries=1, backoff=0.01))


def test_redirects_as_the_hub_sends_them(host: Host, tmp_path: Path) -> None:
    host.redirects["/resolve/images.zip"] = "/images.zip"
    download(file_of(host, path="/resolve/images.zip"), tmp_path / "f", FAST)
    assert (tmp_path / "f").read_bytes() == CONTENT
    asked = [path for path, _ in host.requests]
    assert asked.count("/resolve/images.zip") == asked.count("/images.zip")  # a fresh signed address for every range


def test_the_log_in_stays_with_the_hub(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "address", lambda file: (str(file.url), {"authorization": "Bearer secret"}))
    with serving(Host()) as hub:
        hub.redirects["/resolve/images.zip"] = f"{host.url}/images.zip"
        download(file_of(hub, path="/resolve/images.zip"), tmp_path / "f", FAST)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert hub.authorised == {"/resolve/images.zip"}
    assert host.authorised == set()


def test_a_server_without_ranges(host: Host, tmp_path: Path) -> None:
    host.ranges = False
    host.break_after, host.breaks = 5_000, 2
    seen: list[int] = []
    download(file_of(host), tmp_path / "f", FAST, advance=seen.append)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert sum(seen) == len(CONTENT)


def full_after(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """A disk with room for so many bytes."""
    write = os.pwrite

    def pwrite(handle: int, data: memoryview, offset: int) -> int:
        if offset + len(data) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data, offset)

    monkeypatch.setattr(fetch.os, "pwrite", pwrite)


def test_a_full_disk_is_named_and_loses_nothing(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        full_after(patch, 5 * CHUNK)
        with pytest.raises(PrepareError, match=r"the disk is full while downloading .*/f: free some"):
            download(file_of(host), tmp_path / "f", Transfer(1, CHUNK, 3, 0.01))
    assert partial_size(tmp_path / "f") == 5 * CHUNK
    host.served = 0
    download(file_of(host), tmp_path / "f", FAST)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert host.served == len(CONTENT) - 5 * CHUNK + 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_disk(host: Host, tmp_path: Path) -> None:
    host.ranges = False
    (tmp_path / "f.part").symlink_to("/dev/full")
    with pytest.raises(PrepareError, match="the disk is full while downloading"):
        download(file_of(host), tmp_path / "f", FAST)
