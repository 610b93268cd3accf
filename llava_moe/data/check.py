"""Looks for broken records and images of plain data files before any compute is spent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from llava_moe.data.image import load_image
from llava_moe.data.parallel import usable_cores
from llava_moe.data.records import Source, open_plain, walk
from llava_moe.data.schema import DataError

MAX_SHOWN = 10
_BLOCK = 1024


@dataclass
class CheckReport:
    """What `check_sources` found; `problems` is empty if everything can be trained on."""

    num_records: int = 0
    num_images: int = 0
    problems: list[str] = field(default_factory=list)

    def raise_if_broken(self) -> None:
        """Raises one DataError that names the first problems, if there are any."""
        raise_problems(self.problems, self.num_records)


def raise_problems(problems: Sequence[str], num_records: int, total: int | None = None) -> None:
    """One error for all problems; nothing if there are none.

    Args:
        problems: what is wrong, or as much of it as was kept.
        num_records: records that were looked at.
        total: how many problems there were, if not all were kept.
    """
    if not problems:
        return
    total = len(problems) if total is None else total
    shown = "\n".join(f"  - {problem}" for problem in problems[:MAX_SHOWN])
    more = f"\n  ... and {total - MAX_SHOWN} more" if total > MAX_SHOWN else ""
    raise DataError(f"{total} problem(s) in {num_records} record(s):\n{shown}{more}")


def check_sources(
    sources: Sequence[Source],
    *,
    num_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Checks every record and decodes every image once, frames that are files included; video files are only found.

    Args:
        sources: data files with their image folders.
        num_workers: threads (PIL decodes outside the interpreter lock); None: one for each core.
        progress: is told how many images are done, and of how many.

    Returns:
        The report of all problems: those of the records in the order of the data, then those of the images.
    """
    readers, problems = open_plain(sources)
    num_records = len(problems)
    first_user: dict[Path, tuple[str, str]] = {}  # of each image: the record, and its data file
    for found in walk(readers):
        num_records += 1
        if found.sample is None:
            problems.append(found.problem)
            continue
        sample = found.sample
        for path in sample.files if sample.video is None or isinstance(sample.video, tuple) else ():
            first_user.setdefault(path, (sample.id, sample.source))

    def decode(item: tuple[Path, tuple[str, str]]) -> str | None:
        path, (sample_id, source) = item
        try:
            load_image(path, sample_id)
        except DataError as error:
            return f"{source}: {error}"
        return None

    images = iter(first_user.items())
    done = 0
    with ThreadPoolExecutor(max_workers=num_workers or usable_cores()) as pool:
        while block := list(islice(images, _BLOCK)):  # a pool takes all that it is given at once, one object for each
            problems += [problem for problem in pool.map(decode, block) if problem is not None]
            done += len(block)
            if progress is not None:
                progress(done, len(first_user))
    return CheckReport(num_records, len(first_user), problems)
