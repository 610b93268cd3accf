"""Prepares the data sets of benchmarks as a mirror for `llava-moe eval --mirror DIR`, which needs no network then."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from data_prep.benchmarks.card import DEFAULT_CONFIG
from data_prep.benchmarks.known import KNOWN, Known, Split, load_known
from data_prep.benchmarks.needs import Need, needs
from data_prep.benchmarks.prepare import Step, carry_out, make_step, recorded
from data_prep.benchmarks.verify import verify
from data_prep.errors import InterruptError, PrepareError, explain_os_error, readable
from data_prep.manifest import UNKNOWN, ManifestError
from data_prep.plan import free_space
from data_prep.state import RunLock
from llava_moe.evaluation.mirror import MANIFEST, Recorded
from llava_moe.evaluation.suites import SUITES


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="bash scripts/prepare_benchmarks.sh", description=__doc__)
    made.add_argument("names", nargs="*", metavar="SUITE|TASK", help=f"suites ({', '.join(SUITES.names())}) or tasks")
    made.add_argument("--mirror", type=Path, required=True, help="the folder of the mirror; it is made")
    made.add_argument(
        "--from",
        dest="given",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="where copies are already (a mirror, or the cache of the Hub's client, $HF_HOME/hub); linked or copied, "
        "never changed (may be repeated)",
    )
    made.add_argument("--offline", action="store_true", help="fetch nothing: what is not there is an error")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="only say what would be done, without network")
    what.add_argument("--check", action="store_true", help=f"compare with {MANIFEST}: sizes, sha256, rows; no network")
    made.add_argument("--known", type=Path, default=KNOWN, help="another list of licences and commits")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 something failed, 2 a wrong command line, 130 interrupted."""
    arguments = parser().parse_args(argv)
    try:
        known = load_known(arguments.known)
        if not arguments.names and not arguments.check:
            raise ManifestError(f"name suites or tasks; suites are {', '.join(SUITES.names())}")
        for place in arguments.given:
            if not place.is_dir():
                raise ManifestError(f"--from {place}: no such folder")
        wanted = needs(arguments.names) if arguments.names else None
    except ManifestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder = arguments.mirror.absolute()
    try:
        if arguments.check:
            return _check(folder, wanted)
        assert wanted is not None
        places = [place.absolute() for place in arguments.given]
        if arguments.dry_run:
            return _dry_run(folder, wanted, known, places)
        with _alone(folder):
            return _prepare(folder, wanted, known, places, arguments.offline)
    except PrepareError as error:
        _fail(str(error))
        return 1
    except (InterruptError, KeyboardInterrupt):
        print("interrupted; what was fetched is kept: run the same command again to go on", file=sys.stderr)
        return 130


def _fail(text: str) -> None:
    print("\n".join(f"error: {line}" for line in text.splitlines()), file=sys.stderr, flush=True)


def _check(folder: Path, wanted: Sequence[Need] | None) -> int:
    problems = verify(folder, wanted, print)
    for problem in problems:
        _fail(problem)
    if problems:
        _fail("delete the files that are wrong and run the same without --check: it fetches what is missing")
    return 1 if problems else 0


def _dry_run(folder: Path, wanted: Sequence[Need], known: dict[str, Known], places: Sequence[Path]) -> int:
    total, unknown, failed = 0, 0, 0
    records = recorded(folder)
    for need in wanted:
        facts = known.get(need.repo, Known())
        try:
            step = make_step(folder, need, places)
        except PrepareError as error:
            _fail(str(error))
            failed += 1
            continue
        print(_describe(step, facts, records.get(need.repo)), flush=True)
        if step.kind == "download":
            size = _size(need, facts)
            total, unknown = total + (size or 0), unknown + (size is None)
    more = f" and {unknown} data set(s) of unknown size" if unknown else ""
    print(f"to download: about {readable(total)}{more}; free in {folder}: {readable(free_space(folder))}")
    return 1 if failed else 0


def _describe(step: Step, facts: Known, record: Recorded | None) -> str:
    need, source = step.need, step.copy.name if step.copy else ""
    state = {"ready": "ready", "adopt": "there, to be recorded", "given": f"from {source}", "download": "to download"}
    lines = [f"{need.repo}: {state[step.kind]}", *([f"  note: {step.remark}"] if step.remark else [])]
    for name in need.names():
        split = facts.splits.get(name, Split())
        size = readable(split.size) if split.size else "size unknown"
        lines.append(f"  {name}: {split.rows or 'unknown number of'} rows, {size}")
    revision = record.revision if record is not None else facts.revision
    if step.kind == "download":
        lines.append(f"  commit: {revision or f'the newest, which {MANIFEST} will record'}")
    lines += [f"  licence: {facts.licence}", f"  read by: {', '.join(need.tasks)}"]
    return "\n".join(lines)


def _size(need: Need, facts: Known) -> int | None:
    sizes = [facts.splits.get(name, Split()).size for name in need.names()]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _prepare(
    folder: Path, wanted: Sequence[Need], known: dict[str, Known], places: Sequence[Path], offline: bool
) -> int:
    failed: list[str] = []
    for number, need in enumerate(wanted, start=1):
        facts = known.get(need.repo, Known())
        try:
            step = make_step(folder, need, places)
            if offline and step.kind == "download":
                reason = f"; {step.remark}" if step.remark else ""
                raise PrepareError(f"{need.repo}: --offline, and neither in {folder} nor in --from{reason}")
            print(f"[{number}/{len(wanted)}] {need.repo} ({', '.join(need.names())}): {step.kind}", flush=True)
            if step.remark:
                print(f"  note: {step.remark}", flush=True)
            print("\n".join(f"  {line}" for line in _conclude(need, carry_out(folder, step, facts), facts)), flush=True)
        except PrepareError as error:  # the others are of use without it
            _fail(str(error))
            failed.append(need.repo)
    if failed:
        _fail(f"{len(failed)} of {len(wanted)} data sets are not ready: {', '.join(failed)}")
        return 1
    print(f"{folder} is ready: llava-moe eval CHECKPOINT --tasks ... --mirror {folder}")
    return 0


def _conclude(need: Need, record: Recorded, facts: Known) -> list[str]:
    lines = []
    for name, (config, split) in zip(need.names(), need.pairs(), strict=True):
        rows = record.rows[config or DEFAULT_CONFIG][split]
        expected = facts.splits.get(name, Split()).rows
        odd = f", {expected} were expected" if expected is not None and rows not in (None, expected) else ""
        lines.append(f"{name}: {'not counted' if rows is None else f'{rows} rows'}{odd}")
    size = sum(file.size for file in record.files.values())
    lines.append(f"{readable(size)} in {len(record.files)} files, commit {record.revision or UNKNOWN}")
    lines.append(f"licence: {record.licence}")
    return lines


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two runs in one mirror would move the same files."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise PrepareError(f"another run works in {folder}; wait for it or choose another --mirror") from None
    except OSError as error:
        raise explain_os_error(error, folder, "writing to") from error
    try:
        yield
    finally:
        lock.release()
