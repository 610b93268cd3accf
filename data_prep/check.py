"""The last step: every record can be trained on, or is left out and named.

Writes the records where the recipes look for them, and `NAME.report.json` beside: counts, formats, and every dropped
record with its place, id and reason. Nothing is dropped silently, and too much is an error.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import PrepareError, explain_os_error
from data_prep.fetch import file_sha256
from data_prep.images import Verdict, look, look_at_all, make_jpeg
from data_prep.manifest import Mixture
from data_prep.obtain import Progress
from data_prep.ocr_vqa import fetch_pictures, read_addresses


@dataclass(frozen=True)
class Checking:
    """How to check.

    Attributes:
        workers: processes that decode.
        decode: False only looks whether the files exist.
        max_dropped: share of the records that may be left out.
        jpeg: turn odd OCR-VQA files into real JPEGs.
        addresses: OCR-VQA's dataset.json, to fetch dead pictures again.
        connections: parallel requests for that.
    """

    workers: int = 1
    decode: bool = True
    max_dropped: float = 0.01
    jpeg: bool = False
    addresses: Path | None = None
    connections: int = 8


@dataclass(frozen=True)
class _Record:
    index: int
    id: str
    images: tuple[str, ...]
    problem: str


def check(
    mixture: Mixture, data: Path, source: Path, checking: Checking, progress: Progress, stop: threading.Event
) -> dict[str, Any]:
    """Looks at every record and image, mends what can be mended, and writes what can be trained on.

    Args:
        mixture: what to check.
        data: the data folder, with the images in place.
        source: upstream's record file.
        checking: how.
        progress: shows how far it is.
        stop: when set, ends soon.

    Returns:
        The report, as written.

    Raises:
        PrepareError: the record file is not upstream's, too many records would be dropped, or the disk is full.
    """
    raw, records = _read(mixture, data, source)
    paths = list(dict.fromkeys(path for record in records for path in record.images))
    advance = progress.task(f"check the images of {mixture.name}", len(paths))
    verdicts = look_at_all(paths, workers=checking.workers, decode=checking.decode, advance=advance)
    mended = _mend(mixture, data, verdicts, checking, progress, stop)
    dropped = [found for record in records if (found := _fault(record, verdicts, data / mixture.image_folder))]
    report = _report(mixture, data, records, verdicts, dropped) | mended | {"decoded": checking.decode}
    target = data / mixture.json
    report_path = target.with_suffix(".report.json")
    share = len(dropped) / len(records)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if share > checking.max_dropped:
            _write_json(report_path, report, indent=2)
            raise PrepareError(
                f"{mixture.name}: {len(dropped)} of {len(records)} records ({share:.1%}) cannot be trained on, more "
                f"than --max-dropped {checking.max_dropped:g}: {_summary(dropped)}; all of them: {report_path}"
            )
        _write_records(source, target, raw, {found["index"] for found in dropped})
        report["written"] = {
            "file": mixture.json,
            "records": len(records) - len(dropped),
            "sha256": file_sha256(target),
            "same_as_upstream": not dropped,
        }
        _write_json(report_path, report, indent=2)
    except OSError as error:
        raise explain_os_error(error, target, "writing") from error
    return report


def _read(mixture: Mixture, data: Path, source: Path) -> tuple[list[dict[str, Any]], list[_Record]]:
    # imported here: it brings torch and transformers where they are installed, and the workers must start without
    from llava_moe.data.schema import DataError, load_records, parse_record

    try:
        raw = load_records(source)
    except DataError as error:
        raise PrepareError(str(error)) from error
    records = []
    for index, entry in enumerate(raw):
        try:
            sample = parse_record(entry, data / mixture.image_folder, source.name)
            records.append(_Record(index, sample.id, tuple(str(path) for path in sample.images), ""))
        except DataError as error:
            records.append(_Record(index, str(entry.get("id")), (), str(error)))
    text_only = sum("image" not in entry for entry in raw)
    if (len(raw), text_only) != (mixture.records, mixture.text_only):
        raise PrepareError(
            f"{source}: {len(raw)} records, {text_only} of them without image; {mixture.name} has "
            f"{mixture.records} and {mixture.text_only}: this is another file"
        )
    return raw, records


def _mend(
    mixture: Mixture,
    data: Path,
    verdicts: dict[str, Verdict],
    checking: Checking,
    progress: Progress,
    stop: threading.Event,
) -> dict[str, Any]:
    """Fetches dead pictures again and re-encodes odd ones, where asked to; updates the verdicts."""
    folders = [str((data / f.unpack.into).absolute()) + os.sep for f in mixture.archives if f.odd_names and f.unpack]
    ours = [path for path in verdicts if any(path.startswith(folder) for folder in folders)]
    mended: dict[str, Any] = {"refetched": 0, "not_refetched": {}, "reencoded": 0}
    dead = [path for path in ours if verdicts[path][1]]
    if checking.addresses is not None and dead:
        addresses = read_addresses(checking.addresses)
        advance = progress.task("fetch dead OCR-VQA pictures", len(dead))
        results = fetch_pictures(
            [Path(path) for path in dead], addresses, connections=checking.connections, advance=advance, stop=stop
        )
        for picture, problem in results.items():
            if problem:
                mended["not_refetched"][picture.name] = problem
            else:
                verdicts[str(picture)] = look(picture)
                mended["refetched"] += 1
    if checking.jpeg and checking.decode:
        for path in ours:
            if verdicts[path][0] != "JPEG" and not verdicts[path][1]:
                try:
                    make_jpeg(Path(path))
                except OSError as error:
                    raise explain_os_error(error, Path(path), "writing") from error
                verdicts[path] = look(path)
                mended["reencoded"] += 1
    return mended


def _fault(record: _Record, verdicts: dict[str, Verdict], folder: Path) -> dict[str, Any] | None:
    if record.problem:
        return {"index": record.index, "id": record.id, "image": None, "reason": record.problem}
    for path in record.images:
        if verdicts[path][1]:
            name = os.path.relpath(path, folder)
            return {"index": record.index, "id": record.id, "image": name, "reason": verdicts[path][1]}
    return None


def _report(
    mixture: Mixture,
    data: Path,
    records: Sequence[_Record],
    verdicts: dict[str, Verdict],
    dropped: list[dict[str, Any]],
) -> dict[str, Any]:
    folder = data / mixture.image_folder

    def group(path: str) -> str:
        parts = Path(os.path.relpath(path, folder)).parts
        return parts[0] if len(parts) > 2 else mixture.image_folder

    folders: dict[str, Counter[str]] = {}
    for record in records:
        for path in record.images[:1]:
            folders.setdefault(group(path), Counter())["records"] += 1
    for path, (_, problem) in verdicts.items():
        counts = folders.setdefault(group(path), Counter())
        counts["images"] += 1
        counts["dead"] += bool(problem)
    return {
        "mixture": mixture.name,
        "records": len(records),
        "text_only": mixture.text_only,
        "folders": {name: dict(counts) for name, counts in sorted(folders.items())},
        "formats": dict(Counter(kind for kind, _ in verdicts.values() if kind).most_common()),
        "written": None,
        "dropped": dropped,
    }


def _summary(dropped: Sequence[dict[str, Any]]) -> str:
    """The commonest reasons, by folder."""
    places = (os.path.dirname(found["image"] or "") or "record" for found in dropped)
    common = Counter(f"{place}: {found['reason'][:80]}" for place, found in zip(places, dropped, strict=True))
    return "; ".join(f"{count} x {reason}" for reason, count in common.most_common(3))


def _write_records(source: Path, target: Path, raw: list[dict[str, Any]], dropped: set[int]) -> None:
    """Upstream's bytes if nothing is dropped, so that the checksum stays the published one."""
    if dropped:
        _write_json(target, [entry for index, entry in enumerate(raw) if index not in dropped])
        return
    fresh = target.with_name(f"{target.name}.new")
    shutil.copyfile(source, fresh)
    os.replace(fresh, target)


def _write_json(target: Path, content: Any, indent: int | None = None) -> None:
    fresh = target.with_name(f"{target.name}.new")
    with fresh.open("w", encoding="utf-8") as handle:
        json.dump(content, handle, ensure_ascii=False, indent=indent)
        handle.write("\n")
    os.replace(fresh, target)
