"""Fetches, unpacks and checks a mixture; what is there already is used, and an interrupted run goes on."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data_prep.check import Checking, check
from data_prep.errors import InterruptError, PrepareError, readable
from data_prep.fetch import Transfer
from data_prep.manifest import MANIFEST, ManifestError, Mixture, load_manifest
from data_prep.obtain import Context, obtain
from data_prep.plan import Plan, download_path, free_space, make_plan
from data_prep.state import RunLock, State

REPO = Path(__file__).parents[1]


class Display:
    """Bars on a terminal, otherwise a line for each tenth."""

    def __init__(self) -> None:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._lock = threading.Lock()
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._bars = Progress(TextColumn("{task.description}"), *columns, console=self._console)
        if self._console.is_terminal:
            self._bars.start()

    def task(self, what: str, total: int) -> Callable[[int], None]:
        """A new line; the result is called with the amounts done."""
        if self._console.is_terminal:
            bar = self._bars.add_task(what, total=total)
            return lambda amount: self._bars.advance(bar, amount)
        done = shown = 0

        def advance(amount: int) -> None:
            nonlocal done, shown
            with self._lock:
                done += amount
                tenths = min(10, 10 * done // max(1, total))
                if tenths > shown:
                    shown = tenths
                    print(f"{what}: {10 * tenths} %", file=sys.stderr, flush=True)

        return advance

    def say(self, text: str) -> None:
        """A message beside the lines."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Takes the bars away."""
        if self._console.is_terminal:
            self._bars.stop()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parser(mixtures: Sequence[str] = ("llava_pretrain", "llava_mix665k")) -> argparse.ArgumentParser:
    """The command line."""
    default = Path(os.environ.get("DATA") or "playground/data")
    made = argparse.ArgumentParser(prog="bash scripts/prepare_data.sh", description=__doc__)
    made.add_argument("mixture", nargs="+", help=f"what to prepare: {', '.join(mixtures)}")
    made.add_argument("--data", type=Path, default=REPO / default, help="the data folder ($DATA, or %(default)s)")
    made.add_argument(
        "--from",
        dest="given",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="where archives or unpacked folders are already; they are linked, never changed (may be repeated)",
    )
    made.add_argument("--dry-run", action="store_true", help="only say what would be done, with sizes and free disk")
    made.add_argument("--offline", action="store_true", help="fetch nothing: what is not there is an error")
    made.add_argument("--connections", type=int, default=4, help="parallel ranges for each file (%(default)s)")
    made.add_argument("--workers", type=int, default=_cores(), help="processes that decode images")
    made.add_argument(
        "--delete-archives", action="store_true", help="remove each downloaded archive once it is unpacked"
    )
    made.add_argument("--no-decode", action="store_true", help="only look whether the images exist, do not open them")
    made.add_argument("--max-dropped", type=float, default=0.01, metavar="SHARE", help="of the records (%(default)s)")
    made.add_argument("--reencode-jpeg", action="store_true", help="make real JPEGs of OCR-VQA's GIF and PNG files")
    made.add_argument("--ocr-vqa-urls", type=Path, metavar="FILE", help="OCR-VQA's dataset.json, to fetch dead files")
    made.add_argument("--manifest", type=Path, default=MANIFEST, help="another list of files, e.g. with mirrors")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 something failed, 2 a wrong command line or manifest, 130 interrupted."""
    arguments = parser().parse_args(argv)
    try:
        manifest = load_manifest(arguments.manifest)
        unknown = [name for name in arguments.mixture if name not in manifest]
        if unknown:
            raise ManifestError(f"unknown mixture {unknown[0]!r}; known: {', '.join(manifest)}")
        _check_arguments(arguments)
    except ManifestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        for name in arguments.mixture:
            prepare(manifest[name], arguments)
    except PrepareError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    except (InterruptError, KeyboardInterrupt):
        print("interrupted; what was fetched is kept: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    for key in ("connections", "workers"):
        if getattr(arguments, key) < 1:
            raise ManifestError(f"--{key} {getattr(arguments, key)}: must be at least 1")
    if not 0 <= arguments.max_dropped <= 1:
        raise ManifestError(f"--max-dropped {arguments.max_dropped}: must be between 0 and 1")
    for place in arguments.given:
        if not place.is_dir():
            raise ManifestError(f"--from {place}: no such folder")


def prepare(mixture: Mixture, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """One mixture, from plan to report; None after a dry run.

    Raises:
        PrepareError: something failed.
        InterruptError: SIGTERM arrived (SIGINT raises KeyboardInterrupt).
    """
    data = arguments.data.absolute()
    state = State(data / "downloads" / "state.json")
    plan = make_plan(mixture, data, [place.absolute() for place in arguments.given], state)
    space, free = plan.space(arguments.delete_archives), free_space(data)
    print(_describe(mixture, data, plan, space, free), flush=True)
    if arguments.dry_run:
        return None
    lacking = [step for step in plan.steps if step.kind == "download"]
    if arguments.offline and lacking:
        names = ", ".join(f"{step.file.name} ({step.file.filename})" for step in lacking)
        raise PrepareError(f"--offline, and not found in {data} or --from: {names}")
    if space > free:
        mend = "free some, choose another --data, or use --delete-archives or --from"
        raise PrepareError(f"{readable(space)} are needed on the disk of {data}, {readable(free)} are free: {mend}")
    with _alone(data), _stoppable() as stop, _display() as display:
        transfer = Transfer(connections=arguments.connections)
        obtain(plan, Context(data, state, transfer, display, stop, arguments.delete_archives))
        record_step = next(step for step in plan.steps if step.file.unpack is None)
        source = record_step.source or download_path(data, mixture.record_file)
        checking = Checking(
            workers=arguments.workers,
            decode=not arguments.no_decode,
            max_dropped=arguments.max_dropped,
            jpeg=arguments.reencode_jpeg,
            addresses=arguments.ocr_vqa_urls,
        )
        report = check(mixture, data, source, checking, display, stop)
    print(_conclude(mixture, data, report), flush=True)
    return report


def _describe(mixture: Mixture, data: Path, plan: Plan, space: int, free: int) -> str:
    lines = [f"{mixture.name}: {mixture.summary}", f"  into {data / mixture.json} and {data / mixture.image_folder}"]
    lines += [f"  {step}" for step in plan.steps]
    lines += [f"  note: {remark}" for remark in plan.remarks]
    enough = "" if space <= free else "  NOT ENOUGH"
    lines.append(
        f"  to download {readable(plan.to_fetch)}; disk needed {readable(space)}, free {readable(free)}{enough}"
    )
    lines += [f"  licence of {file.name}: {file.licence}" for file in mixture.files]
    return "\n".join(lines)


def _conclude(mixture: Mixture, data: Path, report: dict[str, Any]) -> str:
    written, target = report["written"], data / mixture.json
    lines = [f"{mixture.name}: {written['records']} of {report['records']} records are ready in {target}"]
    for name, counts in report["folders"].items():
        line = f"  {name}: {counts.get('records', 0)} records, {counts.get('images', 0)} images"
        lines.append(line + (f", {counts['dead']} dead" if counts.get("dead") else ""))
    odd = {kind: count for kind, count in report["formats"].items() if kind != "JPEG"}
    if odd:
        lines.append(
            f"  not JPEG: {', '.join(f'{count} {kind}' for kind, count in odd.items())} (readers go by content)"
        )
    if report["dropped"]:
        lines.append(
            f"  {len(report['dropped'])} dropped, each with its reason in {target.with_suffix('.report.json')}"
        )
    return "\n".join(lines)


@contextmanager
def _alone(data: Path) -> Iterator[None]:
    """Two runs in one folder would write the same partial files."""
    path = data / "downloads" / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = RunLock(path, timeout=0)
        lock.acquire()
    except Timeout:
        raise PrepareError(f"another run works in {data}; wait for it or choose another --data") from None
    except OSError as error:
        raise PrepareError(f"{path.parent}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """SIGTERM ends the work as Ctrl-C does, with everything kept."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def end(*_: object) -> None:
        stop.set()
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, end)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def _display() -> Iterator[Display]:
    display = Display()
    try:
        yield display
    finally:
        display.close()
