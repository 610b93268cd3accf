"""Looks at every record and every image of a mixture before any compute is spent, and writes a clean index of the rest.

`record_check.py` lists what can be wrong with a record. One with a problem is left out of the index; nothing takes its
place. Several processes do the work: decoding leaves Python's lock alone, but rendering and tokenising hold it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava_moe.data.image_marks import Benchmarks, Match
from llava_moe.data.index import ROW, Measure, Tally, write_index
from llava_moe.data.mixture import Mixture
from llava_moe.data.parallel import in_order, usable_cores
from llava_moe.data.record_check import OVERLONG, Limits, Problem, RecordChecker, Verdict
from llava_moe.data.records import Places
from llava_moe.data.schema import DataError
from llava_moe.data.sources import Locator, Reader, open_files

__all__ = ["MAX_EXAMPLES", "OVERLONG", "Limits", "MixtureReport", "SourceCount", "check_mixture", "processor_mark"]

MAX_EXAMPLES = 10
_WORTH_A_PROCESS = 512
Progress = Callable[[int, int], None]
"""(records done, records in all)"""


@dataclass
class SourceCount:
    """Records of one source: in its files, and drawn for an epoch (repeats counted)."""

    path: str
    records: int
    drawn: int


@dataclass
class MixtureReport:
    """What `check_mixture` found.

    Attributes:
        sources: how many records each has and gives.
        records: drawn for one epoch, repeats counted.
        kept, truncated: of these.
        left_out: of these, by the first problem of the record; a file that cannot be read to its end counts as one.
        images: different image files, and images inside the data files.
        counts: problems by kind, repeats not counted; a record may have several.
        examples: the first messages of each kind.
        lengths: tokens of the kept samples, int32; empty without a processor.
        matches: (record, image and benchmark) of every image that a benchmark has.
        benchmarks: images of each benchmark.
        decoded: whether the images were decoded, or only looked for.
        seconds: that the check took.
    """

    sources: list[SourceCount] = field(default_factory=list)
    records: int = 0
    kept: int = 0
    truncated: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    images: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    matches: list[tuple[str, Match]] = field(default_factory=list)
    benchmarks: dict[str, int] = field(default_factory=dict)
    decoded: bool = True
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        """Whether every record can be trained on."""
        return not self.counts

    def add(self, verdict: Verdict, times: int) -> None:
        """Takes the verdict of a record that an epoch has so many times; image files are counted elsewhere."""
        self.images += verdict.embedded
        self.matches += verdict.matches
        self.truncated += times * (verdict.uncut > verdict.length)
        for problem in verdict.problems:
            self.note(problem)

    def note(self, problem: Problem) -> None:
        self.counts[problem.kind] += 1
        shown = self.examples.setdefault(problem.kind, [])
        if len(shown) < MAX_EXAMPLES:
            shown.append(problem.message)


def processor_mark(processor: Any) -> str:
    """Changes whenever the lengths of the same samples could."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = {
        "template": processor.template,
        "template_options": processor.template_options,
        "image_mode": processor.image_mode,
        "tiling": getattr(processor, "tiling", None),
        "num_frames": getattr(processor, "num_frames", None),
        "image_tokens": processor.num_image_tokens,
        "chat_template": tokenizer.chat_template,
        "tokenizer": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
    }
    return hashlib.sha1(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def check_mixture(
    mixture: Mixture,
    *,
    processor: Any = None,
    limits: Limits | None = None,
    benchmarks: Benchmarks | None = None,
    index: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> MixtureReport:
    """Checks every record that the mixture draws, once each, and every image of theirs.

    Args:
        mixture: the sources.
        processor: of the model to be trained; None leaves template and lengths unchecked.
        limits: see there; by default those that need no processor.
        benchmarks: images that training data should not have.
        index: folder for the clean index; None writes none.
        workers: processes, 0 for this one alone; None: one for each core where there is enough to do.
        progress: is told how many records are done, and of how many.

    Raises:
        DataError: a source is missing or of no known kind, a limit asks for more than there is, or nothing is left for
            the index. Problems of single records are in the report.
    """
    began = time.perf_counter()
    limits = limits or Limits()
    report = MixtureReport(benchmarks=dict(benchmarks.sizes) if benchmarks is not None else {})
    checker = RecordChecker(limits, processor, benchmarks)
    readers, rows = _draw(mixture, report)
    unique, back = np.unique(rows[["file", "start", "size"]], return_inverse=True)
    if workers is None:
        workers = min(usable_cores(), len(unique) // _WORTH_A_PROCESS)
    repeats = np.bincount(back, minlength=len(unique))
    length, visuals = np.zeros(len(unique), np.int32), np.zeros(len(unique), np.int16)
    kept = np.zeros(len(unique), bool)
    # Nobody knows how many records a broken file has lost; it counts as one, so that training on the rest is refused.
    left_out = Counter({"file": report.counts["file"]}) if report.counts["file"] else Counter()
    files: set[bytes] = set()
    for done, verdict in enumerate(_verdicts(checker, readers, unique, workers)):
        times = int(repeats[done])
        length[done], visuals[done], kept[done] = verdict.length, verdict.visuals, not verdict.problems
        files.update(verdict.files)
        report.add(verdict, times)
        if verdict.problems:
            left_out[verdict.problems[0].kind] += times
        if progress is not None:
            progress(done + 1, len(unique))
    rows["length"], rows["visuals"] = length[back], visuals[back]
    clean = rows[kept[back]]
    report.left_out, report.kept, report.decoded = dict(left_out), len(clean), limits.decode
    report.images += len(files)
    report.lengths = clean["length"] if processor is not None else report.lengths
    if index is not None:
        mark = None if processor is None else processor_mark(processor)
        measure = Measure(mark, limits.max_length, limits.overlong)
        _write(index, readers, clean, report, measure)
    report.seconds = time.perf_counter() - began
    return report


def _write(
    index: str | Path, readers: list[Reader], clean: np.ndarray, report: MixtureReport, measure: Measure
) -> None:
    if not len(clean):
        shown = [message for messages in report.examples.values() for message in messages]
        raise DataError(
            f"no record of {report.records:,} is left for an index, {dict(report.counts)}:\n"
            + "\n".join(f"  - {message}" for message in shown[:MAX_EXAMPLES])
        )
    tally = Tally(report.records, len(clean), report.left_out, report.truncated)
    write_index(index, readers, clean, measure, tally)


def _draw(mixture: Mixture, report: MixtureReport) -> tuple[list[Reader], np.ndarray]:
    """The readers of all files, and a row for each record of an epoch; counts both in the report."""
    readers: list[Reader] = []
    drawn = [np.zeros(0, ROW)]
    for number, source in enumerate(mixture.sources):
        places = Places()
        for reader in open_files(source.path, source.image_folder, source.split):
            try:
                for locator in reader.scan():
                    places.add(len(readers), locator)
            except DataError as error:
                report.note(Problem("file", str(error)))
            readers.append(reader)
        table = places.table()
        rows = np.zeros(len(table), ROW)
        for name in table.dtype.names or ():
            rows[name] = table[name]
        chosen = source.draw(len(rows), mixture.seed, number)
        report.sources.append(SourceCount(source.path, len(rows), len(chosen)))
        drawn.append(rows[chosen])
    rows = np.concatenate(drawn)
    report.records = len(rows)
    return readers, rows


class _Check:
    """The work of a process: the verdicts of a block of rows."""

    def __init__(self, checker: RecordChecker, readers: Sequence[Reader]) -> None:
        self.checker, self.readers = checker, readers

    def __call__(self, block: np.ndarray) -> list[Verdict]:
        check = self.checker.check
        return [check(self.readers[row["file"]], Locator(int(row["start"]), int(row["size"]))) for row in block]


def _verdicts(checker: RecordChecker, readers: Sequence[Reader], rows: np.ndarray, workers: int) -> Iterator[Verdict]:
    """The verdicts in the order of the rows."""
    for verdicts in in_order(_Check(checker, readers), list(_blocks(readers, rows)), workers):
        yield from verdicts


def _blocks(readers: Sequence[Reader], rows: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of one file each, cut where its reader says that another part must be read."""
    edges = np.flatnonzero(np.diff(rows["file"])) + 1
    for of_file in np.split(rows, edges) if len(rows) else ():
        reader = readers[int(of_file["file"][0])]
        for part in np.split(of_file, reader.breaks(of_file["start"])):
            yield from (part[start : start + reader.block] for start in range(0, len(part), reader.block))
