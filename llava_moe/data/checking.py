"""Looks at every record and every image of a mixture before any compute is spent, and writes a clean index of the rest.

Kinds of problems, by the names that reports use:

| kind | what |
| --- | --- |
| file | a data file cannot be read from some place on |
| unreadable | a record is no record (broken JSON, a cut-off shard, an image cell without bytes) |
| record | a record breaks a rule of the schema or does not fit the template |
| placeholders | its image markers and its images differ in number |
| empty_answer | an answer without text |
| missing_image, corrupt_image | the file is not there, or does not decode to its last pixel |
| oversized_image | more pixels than allowed |
| overlong | more tokens than `max_length`, where that is an error or nothing could be kept |
| benchmark_image | an image of a named benchmark, where those are to be left out |

A record with a problem is left out of the index; nothing takes its place. Threads do the work: decoding, hashing and
tokenising leave Python's lock alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_moe.data.image import load_image
from llava_moe.data.image_marks import Benchmarks, Match, mark_of
from llava_moe.data.image_tiles import read_size
from llava_moe.data.image_video import num_shown
from llava_moe.data.index import ROW, Measure, Tally, write_index
from llava_moe.data.mixture import Mixture
from llava_moe.data.schema import DataError, Sample
from llava_moe.data.sources import EmbeddedImage, Locator, Reader, RecordError, open_files

OVERLONG = ("error", "skip", "truncate")
MAX_EXAMPLES = 10
_CHUNK = 32
Progress = Callable[[int, int], None]
"""(records done, records in all)"""


class Problem(NamedTuple):
    kind: str
    message: str


@dataclass(frozen=True)
class Limits:
    """What counts as too much.

    Attributes:
        max_length: the longest sample in tokens, images expanded; None does not limit. Needs a processor.
        overlong: longer samples are an "error", left out ("skip"), or cut ("truncate": left out only where an image
            or everything there is to learn would be cut).
        max_pixels: of one image.
        drop_benchmark_images: leave out records with an image of a benchmark; otherwise they are reported only.
    """

    max_length: int | None = None
    overlong: str = "error"
    max_pixels: int = 64_000_000
    drop_benchmark_images: bool = False

    def __post_init__(self) -> None:
        if self.overlong not in OVERLONG:
            raise DataError(f"overlong={self.overlong!r}; choose one of {', '.join(OVERLONG)}")
        for name, value in (("max_length", self.max_length), ("max_pixels", self.max_pixels)):
            if value is not None and value < 1:
                raise DataError(f"{name}={value} must be at least 1")


@dataclass
class Verdict:
    """Of one record. `length` is 0 where it was not measured, and that of the cut sample where it was truncated."""

    problems: list[Problem] = field(default_factory=list)
    length: int = 0
    uncut: int = 0
    visuals: int = 0
    matches: list[tuple[str, Match]] = field(default_factory=list)


class _Picture(NamedTuple):
    problem: Problem | None  # without the record that it was found in: others may use the same file
    size: tuple[int, int]
    match: Match | None


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
        kept, truncated, overlong_skipped: of these.
        left_out: of these, by the first problem of the record; a file that cannot be read to its end counts as one.
        images: different image files, and images inside the data files.
        counts: problems by kind, repeats not counted; a record may have several.
        examples: the first messages of each kind.
        lengths: tokens of the kept samples, int32; empty without a processor.
        matches: (record, image and benchmark) of every image that a benchmark has.
        benchmarks: images of each benchmark.
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

    @property
    def is_clean(self) -> bool:
        """Whether every record can be trained on."""
        return not self.counts

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


class RecordChecker:
    """Checks single records; may be called from several threads.

    Args:
        limits: see there.
        processor: of the model to be trained; None leaves template and lengths unchecked.
        benchmarks: images that training data should not have.
    """

    def __init__(self, limits: Limits, processor: Any = None, benchmarks: Benchmarks | None = None) -> None:
        if limits.max_length is not None and processor is None:
            raise DataError("max_length counts tokens: name the checkpoint whose processor makes them (--processor)")
        self.limits = limits
        self.benchmarks = benchmarks
        self.num_embedded = 0
        self._processor = processor
        self._own = threading.local()
        self._lock = threading.Lock()
        self._pictures: dict[Path, _Picture] = {}

    @property
    def num_images(self) -> int:
        """Different image files, and images inside data files, seen so far."""
        return len(self._pictures) + self.num_embedded

    def check(self, reader: Reader, locator: Locator) -> Verdict:
        """Everything about one record."""
        verdict = Verdict()
        try:
            sample = reader.sample(locator)
        except RecordError as error:
            verdict.problems.append(Problem(error.kind, str(error)))
            return verdict
        verdict.visuals = sample.num_visuals
        where = f"{sample.source}: record {sample.id!r}"
        if any(turn.role == "assistant" and not turn.text.strip() for turn in sample.turns):
            verdict.problems.append(Problem("empty_answer", f"{where}: an answer is empty; remove the record"))
        pictures = [self._picture(image, sample) for image in sample.files]
        for image, picture in zip(sample.files, pictures, strict=True):
            if picture.problem is not None:
                verdict.problems.append(Problem(picture.problem.kind, f"{where}: {picture.problem.message}"))
            if picture.match is not None:
                verdict.matches.append((f"{where}: {image}", picture.match))
        if verdict.matches and self.limits.drop_benchmark_images:
            verdict.problems.append(Problem("benchmark_image", f"{where}: {verdict.matches[0][1]}"))
        if self._processor is not None and not verdict.problems:
            self._measure(sample, [picture.size for picture in pictures], where, verdict)
        return verdict

    def _picture(self, image: Path | EmbeddedImage, sample: Sample) -> _Picture:
        if isinstance(image, EmbeddedImage):
            with self._lock:
                self.num_embedded += 1
            return self._look(image, sample)
        known = self._pictures.get(image)
        if known is None:
            known = self._pictures[image] = self._look(image, sample)
        return known

    def _look(self, image: Path | EmbeddedImage, sample: Sample) -> _Picture:
        if not image.is_file():
            return _Picture(Problem("missing_image", f"{image} does not exist; check the image folder"), (0, 0), None)
        if image == sample.video:  # frames of a video file are decoded in training
            return _Picture(None, (0, 0), None)
        try:
            height, width = read_size(image, sample.id)  # type: ignore[arg-type]
            if height * width > self.limits.max_pixels:
                said = f"{image} has {width} x {height} pixels, more than {self.limits.max_pixels:,}; scale it down"
                return _Picture(Problem("oversized_image", said), (height, width), None)
            decoded = load_image(image, sample.id)  # type: ignore[arg-type]
        except DataError as error:
            said = str(error).removeprefix(f"record {sample.id!r}: ")
            return _Picture(Problem("corrupt_image", said), (0, 0), None)
        match = None
        if self.benchmarks is not None:
            with image.open("rb") as file:
                match = self.benchmarks.find(mark_of(file.read(), decoded))
        return _Picture(None, (decoded.height, decoded.width), match)

    def _measure(self, sample: Sample, sizes: Sequence[tuple[int, int]], where: str, verdict: Verdict) -> None:
        processor = self._thread_processor()
        try:
            ids, labels = encode(processor, sample, sizes)
        except DataError as error:
            verdict.problems.append(Problem("record", f"{where}: {error}"))
            return
        length, limit = len(ids), self.limits.max_length
        verdict.length = verdict.uncut = length
        if limit is None or length <= limit:
            return
        cuts_image = bool((ids[limit:] == processor.image_token_id).any())
        if self.limits.overlong == "truncate" and not cuts_image and bool((labels[:limit] != -100).any()):
            verdict.length = limit
            return
        why = "; an image or every answer would be cut" if self.limits.overlong == "truncate" else ""
        said = f"{where}: {length} tokens, more than max_length {limit}{why}"
        verdict.problems.append(Problem("overlong", said))

    def _thread_processor(self) -> Any:
        """A copy for each thread: tokenizers keep the options of the last call."""
        if not hasattr(self._own, "processor"):
            with self._lock:
                self._own.processor = copy.deepcopy(self._processor)
        return self._own.processor


def encode(processor: Any, sample: Sample, sizes: Sequence[tuple[int, int]]) -> tuple[Any, Any]:
    """Ids and labels of a sample, from the (height, width) of its images."""
    shapes: list[Any] = list(sizes)
    if sample.video is not None:
        shapes = [num_shown(sample.video, processor.num_frames)]
    encoded = processor.encode_text(sample.turns, sample.num_visuals, processor.image_tokens(shapes))
    return encoded["input_ids"], encoded["labels"]


def check_mixture(
    mixture: Mixture,
    *,
    processor: Any = None,
    limits: Limits | None = None,
    benchmarks: Benchmarks | None = None,
    index: str | Path | None = None,
    workers: int = 8,
    progress: Progress | None = None,
) -> MixtureReport:
    """Checks every record that the mixture draws, once each, and every image of theirs.

    Args:
        mixture: the sources.
        processor: of the model to be trained; None leaves template and lengths unchecked.
        limits: see there; by default those that need no processor.
        benchmarks: images that training data should not have.
        index: folder for the clean index; None writes none.
        workers: threads.
        progress: is told how many records are done, and of how many.

    Raises:
        DataError: a source is missing or of no known kind, a limit asks for more than there is, or nothing is left for
            the index. Problems of single records are in the report.
    """
    limits = limits or Limits()
    report = MixtureReport(benchmarks=dict(benchmarks.sizes) if benchmarks is not None else {})
    readers, rows = _draw(mixture, report)
    unique, back = np.unique(rows[["file", "start", "size"]], return_inverse=True)
    checker = RecordChecker(limits, processor, benchmarks)
    repeats = np.bincount(back, minlength=len(unique))
    length, visuals = np.zeros(len(unique), np.int32), np.zeros(len(unique), np.int16)
    kept = np.zeros(len(unique), bool)
    # Nobody knows how many records a broken file has lost; it counts as one, so that training on the rest is refused.
    left_out = Counter({"file": report.counts["file"]}) if report.counts["file"] else Counter()
    for done, verdict in enumerate(_verdicts(checker, readers, unique, workers)):
        times = int(repeats[done])
        length[done], visuals[done], kept[done] = verdict.length, verdict.visuals, not verdict.problems
        report.matches += verdict.matches
        report.truncated += times * (verdict.uncut > verdict.length)
        for problem in verdict.problems:
            report.note(problem)
        if verdict.problems:
            left_out[verdict.problems[0].kind] += times
        if progress is not None:
            progress(done + 1, len(unique))
    rows["length"], rows["visuals"] = length[back], visuals[back]
    clean = rows[kept[back]]
    report.left_out, report.kept, report.images = dict(left_out), len(clean), checker.num_images
    report.lengths = clean["length"] if processor is not None else report.lengths
    if index is not None:
        if not len(clean):
            raise DataError(f"no record of {report.records} is left for an index; {dict(report.counts)}")
        mark = None if processor is None else processor_mark(processor)
        measure = Measure(mark, limits.max_length, limits.overlong)
        write_index(index, readers, clean, measure, Tally(report.records, len(clean), left_out, report.truncated))
    return report


def _draw(mixture: Mixture, report: MixtureReport) -> tuple[list[Reader], np.ndarray]:
    """The readers of all files, and a row for each record of an epoch; counts both in the report."""
    readers: list[Reader] = []
    drawn = [np.zeros(0, ROW)]
    for place, source in enumerate(mixture.sources):
        of_files = [np.zeros(0, ROW)]
        for reader in open_files(source.path, source.image_folder, source.split):
            found: list[tuple[int, ...]] = []
            try:
                found.extend((len(readers), start, size, 0, 0) for start, size in reader.scan())
            except DataError as error:
                report.note(Problem("file", str(error)))
            readers.append(reader)
            of_files.append(np.array(found, ROW))
        rows = np.concatenate(of_files)
        chosen = source.draw(len(rows), mixture.seed, place)
        report.sources.append(SourceCount(source.path, len(rows), len(chosen)))
        drawn.append(rows[chosen])
    rows = np.concatenate(drawn)
    report.records = len(rows)
    return readers, rows


def _verdicts(checker: RecordChecker, readers: Sequence[Reader], rows: np.ndarray, workers: int) -> Iterator[Verdict]:
    """The verdicts in the order of the rows; not many more blocks are under way than there are threads."""

    def check(block: np.ndarray) -> list[Verdict]:
        return [checker.check(readers[row["file"]], Locator(int(row["start"]), int(row["size"]))) for row in block]

    blocks = iter([rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)])
    with ThreadPoolExecutor(max_workers=workers) as pool:
        pending = deque(pool.submit(check, block) for block in islice(blocks, 2 * workers))
        while pending:
            yield from pending.popleft().result()
            pending.extend(pool.submit(check, block) for block in islice(blocks, 1))
