"""Everything about one record: whether it can be trained on, and how many tokens it has.

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
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llava_moe.data.image import load_image
from llava_moe.data.image_marks import Benchmarks, Match, mark_of
from llava_moe.data.image_tiles import read_size
from llava_moe.data.image_video import num_shown
from llava_moe.data.schema import DataError, Sample
from llava_moe.data.sources import EmbeddedImage, Locator, Reader, RecordError

OVERLONG = ("error", "skip", "truncate")


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
        decode: open every image to its last pixel; otherwise it is only looked whether the files are there, and the
            size of each is read where tokens depend on it.
    """

    max_length: int | None = None
    overlong: str = "error"
    max_pixels: int = 64_000_000
    drop_benchmark_images: bool = False
    decode: bool = True

    def __post_init__(self) -> None:
        if self.overlong not in OVERLONG:
            raise DataError(f"overlong={self.overlong!r}; choose one of {', '.join(OVERLONG)}")
        for name, value in (("max_length", self.max_length), ("max_pixels", self.max_pixels)):
            if value is not None and value < 1:
                raise DataError(f"{name}={value} must be at least 1")


@dataclass
class Verdict:
    """Of one record.

    Attributes:
        problems: what is wrong with it.
        length: its tokens; 0 where they were not counted, and those of the cut sample where it was truncated.
        uncut: its tokens before it was cut.
        visuals: its images and videos.
        files: marks of the image files that this checker has not met before.
        embedded: its images inside the data file.
        matches: (image, benchmark image) of each that a benchmark has.
    """

    problems: list[Problem] = field(default_factory=list)
    length: int = 0
    uncut: int = 0
    visuals: int = 0
    files: list[bytes] = field(default_factory=list)
    embedded: int = 0
    matches: list[tuple[str, Match]] = field(default_factory=list)


class _Picture(NamedTuple):
    problem: Problem | None  # without the record that it was found in: others may use the same file
    size: tuple[int, int]
    match: Match | None


class RecordChecker:
    """Checks single records; remembers the image files that it has met.

    Args:
        limits: see there.
        processor: of the model to be trained; None leaves template and lengths unchecked.
        benchmarks: images that training data should not have.

    Raises:
        DataError: a limit needs a processor, or benchmarks need decoded images.
    """

    def __init__(self, limits: Limits, processor: Any = None, benchmarks: Benchmarks | None = None) -> None:
        if limits.max_length is not None and processor is None:
            raise DataError("max_length counts tokens: name the checkpoint whose processor makes them (--processor)")
        if benchmarks is not None and not limits.decode:
            raise DataError("images are compared with those of benchmarks by their pixels: let them be decoded")
        self.limits = limits
        self.benchmarks = benchmarks
        self._processor = processor
        self._pictures: dict[str, _Picture] = {}

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
        pictures = [self._picture(image, sample, verdict) for image in sample.files]
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

    def _picture(self, image: Path | EmbeddedImage, sample: Sample, verdict: Verdict) -> _Picture:
        if isinstance(image, EmbeddedImage):
            verdict.embedded += 1
            return self._look(image, sample)
        name = str(image)
        if name not in self._pictures:
            self._pictures[name] = self._look(image, sample)
            verdict.files.append(hashlib.blake2b(name.encode(), digest_size=8).digest())
        return self._pictures[name]

    def _look(self, image: Path | EmbeddedImage, sample: Sample) -> _Picture:
        if not image.is_file():
            return _Picture(Problem("missing_image", f"{image} does not exist; check the image folder"), (0, 0), None)
        if image == sample.video:  # frames of a video file are decoded in training
            return _Picture(None, (0, 0), None)
        if not self.limits.decode and getattr(self._processor, "tiling", None) is None:
            return _Picture(None, (1, 1), None)  # whatever its size, an image has one number of tokens
        try:
            height, width = read_size(image, sample.id)  # type: ignore[arg-type]
            if height * width > self.limits.max_pixels:
                said = f"{image} has {width} x {height} pixels, more than {self.limits.max_pixels:,}; scale it down"
                return _Picture(Problem("oversized_image", said), (height, width), None)
            if not self.limits.decode:
                return _Picture(None, (height, width), None)
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
        processor = self._processor
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


def encode(processor: Any, sample: Sample, sizes: Sequence[tuple[int, int]]) -> tuple[Any, Any]:
    """Ids and labels of a sample, from the (height, width) of its images."""
    shapes: list[Any] = list(sizes)
    if sample.video is not None:
        shapes = [num_shown(sample.video, processor.num_frames)]
    encoded = processor.encode_text(sample.turns, sample.num_visuals, processor.image_tokens(shapes))
    return encoded["input_ids"], encoded["labels"]
