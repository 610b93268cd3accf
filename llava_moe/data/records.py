"""The records of plain data files: walked over once, and from then on read from their files one by one.

A Python list of 665,298 parsed records takes gigabytes, in every rank; and as Python counts references inside the
objects, a worker process that only reads such a list still copies its memory, page by page. What is kept here is three
numbers for each record in one array, which workers share.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from llava_moe.data.schema import DataError, Sample
from llava_moe.data.sources import SOURCES, Locator, Reader, kind_of

Source = tuple[str | Path, str | Path]
"""(data file, image folder)"""

PLACE = np.dtype([("file", "<i4"), ("start", "<i8"), ("size", "<i8")])


class Found(NamedTuple):
    """A record: where it is, and the sample or what is wrong with it. A file that breaks off is one such problem."""

    file: int
    locator: Locator
    sample: Sample | None
    problem: str


def open_plain(sources: Sequence[Source]) -> tuple[list[Reader], list[str]]:
    """The readers of all files that can be read, and what is wrong with the others."""
    readers: list[Reader] = []
    problems: list[str] = []
    for path, folder in sources:
        try:
            readers.append(SOURCES.get(kind_of(Path(path)))(Path(path), Path(folder)))
        except DataError as error:
            problems.append(str(error))
    return readers, problems


def walk(readers: Sequence[Reader]) -> Iterator[Found]:
    """Every record in order, one at a time in memory; its image files are looked for and not opened."""
    for number, reader in enumerate(readers):
        try:
            for locator in reader.scan():
                try:
                    sample = reader.sample(locator)
                except DataError as error:
                    yield Found(number, locator, None, str(error))
                    continue
                missing = missing_file(sample)
                yield Found(number, locator, None if missing else sample, missing)
        except DataError as error:
            yield Found(number, Locator(0), None, str(error))


def missing_file(sample: Sample) -> str:
    """What to say of the first file that is not there; empty if all are."""
    for path in sample.files:
        if not path.is_file():
            kind = "image" if sample.video is None else "video"
            return f"{sample.source}: record {sample.id!r}: {kind} {path} does not exist; check the image folder"
    return ""


class Records(Sequence[Sample]):
    """Samples that are read from their files when they are asked for.

    Args:
        readers: of the files.
        places: of `PLACE`; `file` is a number in `readers`.
    """

    def __init__(self, readers: Sequence[Reader], places: np.ndarray) -> None:
        self.readers = list(readers)
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Reads a sample.

        Raises:
            RecordError: its file has changed.
        """
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self.places[index]
        return self.readers[int(row["file"])].sample(Locator(int(row["start"]), int(row["size"])))


class Places:
    """Collects the places of records in 20 bytes each."""

    def __init__(self) -> None:
        self._files, self._starts, self._sizes = array("i"), array("q"), array("q")

    def add(self, file: int, locator: Locator) -> None:
        self._files.append(file)
        self._starts.append(locator.start)
        self._sizes.append(locator.size)

    def table(self) -> np.ndarray:
        """All of them, of `PLACE`."""
        rows = np.empty(len(self._files), PLACE)
        rows["file"], rows["start"], rows["size"] = self._files, self._starts, self._sizes
        return rows
