"""One data set into the mirror: fetched beside it, verified, moved into its place, recorded.

Nothing is read from `DIR/.partial`, where files arrive; what was fetched there stays after an interruption. The card is
moved last but the record, so a data set that is not whole is refused by name and not scored.
"""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.benchmarks.card import CARD, DEFAULT_CONFIG, UPSTREAM_CARD, Selection, licence_of, select
from data_prep.benchmarks.known import Known
from data_prep.benchmarks.needs import Need
from data_prep.benchmarks.origin import FolderOrigin, Origin, copies, on_hub
from data_prep.errors import PrepareError, explain_os_error, readable
from data_prep.fetch import file_sha256
from data_prep.manifest import UNKNOWN
from data_prep.plan import free_space
from llava_moe.evaluation import EvaluationError
from llava_moe.evaluation.mirror import (
    FORMER_ORGANISATION,
    ORGANISATION,
    File,
    Recorded,
    read_manifest,
    read_split,
    write_manifest,
)

PARTIAL = ".partial"
MOVING = ".moving"  # a file there: some of what arrived is in its place already
Kind = Literal["ready", "adopt", "given", "download"]


@dataclass(frozen=True)
class Step:
    """What is to be done about one data set.

    Attributes:
        need: what of it is read.
        kind: ready (nothing), adopt (it lies there, not all of it recorded), given (a copy in `--from`), download.
        copy: the copy in `--from`.
        remark: why a copy is not taken.
    """

    need: Need
    kind: Kind
    copy: FolderOrigin | None = None
    remark: str = ""


def make_step(folder: Path, need: Need, places: Sequence[Path]) -> Step:
    """What is there of a data set, judged by names and sizes; no network.

    Raises:
        PrepareError: something unrecorded and incomplete is in its place.
    """
    record, place = recorded(folder).get(need.repo), folder / need.repo
    whole = record is not None and not wrong_sizes(place, record)
    if record is not None and whole and need.met_by(record):
        return Step(need, "ready")
    interrupted = (folder / PARTIAL / need.repo / MOVING).exists()  # what lies there is this program's
    if place.is_dir() and not interrupted and (record is None or whole):
        try:
            rows_of(place, need)
            return Step(need, "adopt")
        except PrepareError as error:
            if record is None:
                raise PrepareError(
                    f"{error}. It is not of this program: move it away, or give the folder that holds it with --from"
                ) from error
    remark = ""
    for copy in copies(places, need.repo):
        try:
            select(need.repo, copy.card(folder), copy.sizes, need.with_recorded(record).splits)
            return Step(need, "given", copy)
        except PrepareError as error:
            remark = f"the copy in {copy.name} is not taken: {error}"
    return Step(need, "download", remark=remark)


def recorded(folder: Path) -> dict[str, Recorded]:
    """What mirror.json says.

    Raises:
        PrepareError: it cannot be read.
    """
    try:
        return read_manifest(folder)
    except EvaluationError as error:
        raise PrepareError(str(error)) from error


def wrong_sizes(place: Path, record: Recorded) -> list[str]:
    """The recorded files that are not there, or of another size."""
    files = {name: place / name for name in record.files}
    return [
        name for name, path in files.items() if not path.is_file() or path.stat().st_size != record.files[name].size
    ]


def carry_out(folder: Path, step: Step, known: Known) -> Recorded:
    """Brings a data set into the mirror and records it.

    Raises:
        PrepareError: it cannot be had, is not what it should be, or does not fit on the disk.
    """
    place, records = folder / step.need.repo, recorded(folder)
    former = records.get(step.need.repo)
    if step.kind == "ready":
        assert former is not None
        return former
    if step.kind == "adopt":
        record = _adopt(place, step.need.with_recorded(former), former, known)
    else:
        revision = known.revision if former is None else former.revision
        if former is not None and step.copy is None and revision is None:
            raise PrepareError(
                f"{step.need.repo} was taken from {former.origin}, whose commit is not known, so nothing of the Hub "
                f"can be added to it: give --from {former.origin}, or move {place} away and delete its record"
            )
        origin: Origin = on_hub(step.need.repo, revision) if step.copy is None else step.copy
        record = _obtain(folder, step.need.with_recorded(former), origin, former, known)
    write_manifest(folder, {**recorded(folder), step.need.repo: record})
    _link_former_name(folder)
    return record


def _adopt(place: Path, need: Need, former: Recorded | None, known: Known) -> Recorded:
    names = [path.relative_to(place).as_posix() for path in sorted(place.rglob("*")) if path.is_file()]
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    revision, origin = (None, str(place)) if former is None else (former.revision, former.origin)
    card = place / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    licence = licence_of(need.repo, text) or known.licence
    return Recorded(revision, origin, licence, _now(), _files(place, visible), rows_of(place, need))


def _obtain(folder: Path, need: Need, origin: Origin, former: Recorded | None, known: Known) -> Recorded:
    place, work = folder / need.repo, folder / PARTIAL / need.repo
    try:
        work.mkdir(parents=True, exist_ok=True)
        text = origin.card(work)
        selection = select(need.repo, text, origin.sizes, need.splits)
        if not selection.files:
            raise PrepareError(f"{need.repo} ({origin.name}) holds no data files")
        _check_same_revision(need.repo, origin, former)
        here = _whole(place, selection.files, former)
        lacking = [name for name in selection.files if name not in here]
        _check_space(folder, work, lacking, origin)
        origin.fetch(lacking, work)
        fresh = _verified(need.repo, work, lacking, origin)
        (work / MOVING).touch()
        for name in lacking:
            _move(work / name, place / name)
        cards = _write_cards(work, place, text, selection)
    except OSError as error:
        raise explain_os_error(error, place, "writing to") from error
    rows = rows_of(place, need)
    shutil.rmtree(work, ignore_errors=True)
    files = {**here, **fresh, **_files(place, cards)}
    licence = licence_of(need.repo, text) or known.licence
    return Recorded(origin.revision, origin.name, licence, _now(), dict(sorted(files.items())), rows)


def _check_same_revision(repo: str, origin: Origin, former: Recorded | None) -> None:
    """What is added to a data set must be of the same commit, or at least of the same files."""
    if former is None or (origin.revision is not None and origin.revision == former.revision):
        return
    data = {name: file for name, file in former.files.items() if name not in (CARD, UPSTREAM_CARD)}
    if origin.revision != former.revision or any(origin.sizes.get(name) != file.size for name, file in data.items()):
        raise PrepareError(
            f"{repo} lies here at commit {former.revision or UNKNOWN}, and in {origin.name} at "
            f"{origin.revision or UNKNOWN}: they are not mixed. Leave out --from, or move the former away and delete "
            "its record"
        )


def _whole(place: Path, names: Iterable[str], former: Recorded | None) -> dict[str, File]:
    """The recorded files that lie in their place with the right size."""
    if former is None:
        return {}
    wrong = set(wrong_sizes(place, former))
    return {name: former.files[name] for name in names if name in former.files and name not in wrong}


def _check_space(folder: Path, work: Path, names: Sequence[str], origin: Origin) -> None:
    if isinstance(origin, FolderOrigin) and origin.folder.stat().st_dev == work.stat().st_dev:
        return  # linked
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    needed, free = sum(origin.sizes.get(name) or 0 for name in names) - there, free_space(folder)
    if needed > free:
        raise PrepareError(f"{readable(needed)} are needed on the disk of {folder}, {readable(free)} are free")


def _verified(repo: str, work: Path, names: Sequence[str], origin: Origin) -> dict[str, File]:
    """Sizes and checksums of what arrived; a wrong file is thrown away."""
    found = {}
    for name in names:
        path = work / name
        if not path.is_file():
            raise PrepareError(f"{repo}: {name} did not arrive from {origin.name}; run again, it goes on")
        file = File(path.stat().st_size, file_sha256(path))
        size, sha256 = origin.sizes.get(name), origin.sha256.get(name)
        if size not in (None, file.size) or sha256 not in (None, file.sha256):
            path.unlink()
            raise PrepareError(
                f"{repo}: {name} arrived with {file.size} bytes and sha256 {file.sha256}, expected were "
                f"{size or UNKNOWN} and {sha256 or UNKNOWN}; it was thrown away, run again"
            )
        found[name] = file
    return found


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _write_cards(work: Path, place: Path, text: str, selection: Selection) -> list[str]:
    """The card that names what is there, and the publisher's where it differs."""
    if not text:
        return []
    names = [CARD]
    if selection.card is None:
        (place / UPSTREAM_CARD).unlink(missing_ok=True)
    else:
        (work / UPSTREAM_CARD).write_text(text, encoding="utf-8")
        _move(work / UPSTREAM_CARD, place / UPSTREAM_CARD)
        names.append(UPSTREAM_CARD)
    fresh = work / f"{CARD}.new"  # a file of its own: a linked README.md belongs to --from
    fresh.write_text(text if selection.card is None else selection.card, encoding="utf-8")
    _move(fresh, place / CARD)
    return names


def rows_of(place: Path, need: Need) -> dict[str, dict[str, int | None]]:
    """Rows by configuration and split, read from the files.

    Raises:
        PrepareError: a split cannot be read, is empty, or has other rows than the card states.
    """
    rows: dict[str, dict[str, int | None]] = {}
    for config, split in need.pairs():
        try:
            _, number = read_split(place, config, split)
        except EvaluationError as error:
            raise PrepareError(f"{need.repo}, {config or DEFAULT_CONFIG}/{split}: {error}") from error
        rows.setdefault(config or DEFAULT_CONFIG, {})[split] = number
    return rows


def _files(place: Path, names: Iterable[str]) -> dict[str, File]:
    return {name: File((place / name).stat().st_size, file_sha256(place / name)) for name in names}


def _link_former_name(folder: Path) -> None:
    """lmms-eval 0.7.2 looks for the same data sets under the organisation's former name."""
    link = folder / FORMER_ORGANISATION
    if (folder / ORGANISATION).is_dir() and not os.path.lexists(link):
        try:
            link.symlink_to(ORGANISATION)
        except OSError as error:  # a disk without links; 0.7.3, which is pinned, does without
            print(f"note: {link} could not be made ({error.strerror}); only lmms-eval 0.7.2 needs it")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
