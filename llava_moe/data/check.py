"""Looks for broken records and images before any compute is spent."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from llava_moe.data.image import load_image
from llava_moe.data.schema import DataError, Sample, load_records, parse_record

MAX_SHOWN = 10

Source = tuple[str | Path, str | Path]
"""(data file, image folder)"""


@dataclass
class CheckReport:
    """What `check_sources` found; `problems` is empty if everything can be trained on."""

    num_records: int = 0
    num_images: int = 0
    problems: list[str] = field(default_factory=list)

    def raise_if_broken(self) -> None:
        """Raises one DataError that names the first problems, if there are any."""
        raise_problems(self.problems, self.num_records)


def raise_problems(problems: Sequence[str], num_records: int) -> None:
    """One error for all problems; nothing if there are none."""
    if not problems:
        return
    shown = "\n".join(f"  - {problem}" for problem in problems[:MAX_SHOWN])
    more = f"\n  ... and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
    raise DataError(f"{len(problems)} problem(s) in {num_records} record(s):\n{shown}{more}")


def read_sources(sources: Sequence[Source]) -> tuple[list[Sample], list[str]]:
    """Parses every record of every data file and looks whether the image files exist; opens no image.

    Returns:
        The good samples in order, and one message for each bad record or unreadable file.
    """
    samples: list[Sample] = []
    problems: list[str] = []
    exists: dict[Path, bool] = {}
    for json_path, image_folder in sources:
        try:
            records = load_records(Path(json_path))
        except DataError as error:
            problems.append(str(error))
            continue
        for record in records:
            try:
                sample = parse_record(record, Path(image_folder), str(json_path))
            except DataError as error:
                problems.append(str(error))
                continue
            missing = [path for path in sample.files if not exists.setdefault(path, path.is_file())]
            if missing:
                kind = "image" if sample.video is None else "video"
                problems.append(
                    f"{json_path}: record {sample.id!r}: {kind} {missing[0]} does not exist; check the image folder"
                )
            else:
                samples.append(sample)
    return samples, problems


def check_sources(sources: Sequence[Source], *, num_workers: int = 8) -> CheckReport:
    """Checks every record and decodes every image once, frames that are files included; video files are only found.

    Args:
        sources: data files with their image folders.
        num_workers: threads (PIL decodes outside the interpreter lock).

    Returns:
        The report of all problems, in the order of the data.
    """
    samples, problems = read_sources(sources)
    first_user: dict[Path, Sample] = {}
    for sample in samples:
        for path in sample.files if sample.video is None or isinstance(sample.video, tuple) else ():
            first_user.setdefault(path, sample)

    def decode(item: tuple[Path, Sample]) -> str | None:
        path, sample = item
        try:
            load_image(path, sample.id)
        except DataError as error:
            return f"{sample.source}: {error}"
        return None

    with ThreadPoolExecutor(max_workers=num_workers) as pool:
        found = [problem for problem in pool.map(decode, first_user.items()) if problem is not None]
    num_broken_records = len(problems)
    return CheckReport(len(samples) + num_broken_records, len(first_user), problems + found)
