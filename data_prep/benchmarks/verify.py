"""`--check`: everything in a mirror against mirror.json, without network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep.benchmarks.card import DEFAULT_CONFIG
from data_prep.benchmarks.needs import Need
from data_prep.benchmarks.prepare import recorded, rows_of
from data_prep.errors import PrepareError
from data_prep.fetch import file_sha256
from llava_moe.evaluation.mirror import MANIFEST, Recorded


def verify(folder: Path, needs: Sequence[Need] | None, say: Callable[[str], None]) -> list[str]:
    """What is wrong, one line each.

    Args:
        folder: the mirror.
        needs: what is to be checked; None for all that is recorded.
        say: called with a line for each data set that is right.

    Raises:
        PrepareError: mirror.json cannot be read, or there is nothing to check.
    """
    records = recorded(folder)
    if not records:
        raise PrepareError(f"{folder / MANIFEST} does not exist, so there is nothing to compare with; prepare it first")
    problems: list[str] = []
    for repo in records if needs is None else [need.repo for need in needs]:
        need = None if needs is None else next(one for one in needs if one.repo == repo)
        if repo not in records:
            problems.append(f"{repo}: not recorded in {MANIFEST}; needed by {', '.join(need.tasks if need else ())}")
            continue
        found = _wrong(folder / repo, repo, records[repo], need)
        problems += found
        if not found:
            rows = sum(number or 0 for splits in records[repo].rows.values() for number in splits.values())
            say(f"{repo}: {len(records[repo].files)} files and {rows} rows are as recorded")
    return problems


def _wrong(place: Path, repo: str, record: Recorded, need: Need | None) -> list[str]:
    if need is not None and not need.met_by(record):
        lacking = [
            name
            for name, (config, split) in zip(need.names(), need.pairs(), strict=True)
            if split not in record.rows.get(config or DEFAULT_CONFIG, {})
        ]
        return [f"{repo}: {', '.join(lacking)} not recorded; needed by {', '.join(need.tasks)}"]
    problems = []
    for name, expected in record.files.items():
        path = place / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected.size:
            problems.append(f"{path} has {path.stat().st_size} bytes, recorded are {expected.size}")
        elif (found := file_sha256(path)) != expected.sha256:
            problems.append(f"{path} has sha256 {found}, recorded is {expected.sha256}")
    if problems:
        return problems
    whole = Need(repo, {}).with_recorded(record)
    try:
        rows = rows_of(place, whole)
    except PrepareError as error:
        return [str(error)]
    return [] if rows == record.rows else [f"{repo}: rows are {rows}, recorded are {record.rows}"]
