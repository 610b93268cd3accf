"""Carries out a plan: download, verify, unpack or link; several files at a time."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_prep.errors import InterruptError, PrepareError, explain_os_error
from data_prep.fetch import Transfer, download, file_sha256
from data_prep.manifest import Upstream
from data_prep.plan import Plan, Step, download_path
from data_prep.state import State
from data_prep.unpack import add_jpg_names, link_folder, settle_names, unpack


class Progress(Protocol):
    """Shows how far things are."""

    def task(self, what: str, total: int) -> Callable[[int], None]:
        """A new line; the result is called with the amounts done."""

    def say(self, text: str) -> None:
        """A message beside the lines."""


@dataclass(frozen=True)
class Context:
    """What every step needs.

    Attributes:
        data: the data folder.
        state: what earlier runs did.
        transfer: how to talk to servers.
        progress: shows how far things are.
        stop: when set, every step ends soon and keeps what it has.
        delete_archives: remove a downloaded archive once it is unpacked; files are then taken one after the other.
    """

    data: Path
    state: State
    transfer: Transfer
    progress: Progress
    stop: threading.Event
    delete_archives: bool = False


def obtain(plan: Plan, context: Context) -> None:
    """Carries out all steps; one that fails does not stop the others.

    Raises:
        PrepareError: the failures, one line each.
        InterruptError: the stop event was set.
    """
    steps = [step for step in plan.steps if step.kind != "done"]
    for step in plan.steps:
        if step.kind == "done" and step.file.odd_names and step.source is not None:
            settle_names(step.source)
    failures: list[str] = []
    with ThreadPoolExecutor(1 if context.delete_archives else max(1, len(steps))) as pool:
        futures = [pool.submit(_carry_out, step, context) for step in steps]
        try:
            for future in futures:
                try:
                    future.result()
                except PrepareError as error:
                    failures.append(str(error))
                    context.progress.say(f"failed: {error}")
                except InterruptError:
                    context.stop.set()
        except BaseException:  # Ctrl-C arrives here, in the main thread
            context.stop.set()
            for future in futures:
                future.cancel()
            raise
    if context.stop.is_set():
        raise InterruptError
    if failures:
        raise PrepareError("\n".join(failures))


def _carry_out(step: Step, context: Context) -> None:
    file = step.file
    if step.kind == "link":
        assert file.unpack is not None
        assert step.source is not None
        link_folder(step.source, context.data / file.unpack.into, file.odd_names)
        context.state.update(file.name, linked=str(step.source))
        context.progress.say(f"{file.name}: linked {step.source}")
        return
    archive = step.source
    if step.kind == "download":
        archive = download_path(context.data, file)
        advance = context.progress.task(f"download {file.name}", file.size)
        sha256 = download(file, archive, context.transfer, advance=advance, stop=context.stop)
        _agree(file, archive, sha256, context, ours=True)
    elif archive is not None and context.state.verified(file.name, archive) is None:
        advance = context.progress.task(f"verify {file.name}", file.size)
        try:
            sha256 = file_sha256(archive, advance, context.stop)
        except OSError as error:
            raise PrepareError(f"{archive}: {error.strerror}") from error
        _agree(file, archive, sha256, context, ours=False)
    assert archive is not None
    if file.unpack is None:
        _keep_original(archive, download_path(context.data, file))
        return
    advance = context.progress.task(f"unpack {file.name}", file.size)
    count = unpack(archive, file.unpack, context.data, advance=advance, stop=context.stop)
    if count != file.unpack.images:
        context.progress.say(f"{file.name}: {count} images, the manifest says {file.unpack.images}")
    if file.odd_names:
        added = add_jpg_names(context.data / file.unpack.into)
        context.progress.say(f"{file.name}: {added} files of another ending got a .jpg name too")
    context.state.update(file.name, unpacked=count)
    if context.delete_archives and archive == download_path(context.data, file):
        archive.unlink()


def _keep_original(records: Path, kept: Path) -> None:
    """Upstream's records get a copy: the checked ones stand where the recipes look, and `--from` may be gone later."""
    if kept == records:
        return
    fresh = kept.with_name(f"{kept.name}.new")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(records, fresh)
        os.replace(fresh, kept)
    except OSError as error:
        raise explain_os_error(error, kept, "writing") from error


def _agree(file: Upstream, path: Path, sha256: str, context: Context, ours: bool) -> None:
    """Compares a checksum with the manifest's, or where that knows none with the first one we saw."""
    recorded = context.state.get(file.name).get("sha256")
    expected = file.known_sha256 or recorded
    if expected not in (None, sha256):
        where = "the manifest" if file.known_sha256 else "the first copy, recorded in downloads/state.json,"
        mend = "delete it and run again" if ours else "leave it out of --from, or replace it"
        raise PrepareError(f"{path}: wrong checksum: sha256 {sha256}, {where} has {expected}; {mend}")
    if file.known_sha256 is None and recorded is None:
        context.progress.say(f"{file.name}: nobody states its checksum; recorded sha256 {sha256}")
    context.state.verify(file.name, path, sha256)
