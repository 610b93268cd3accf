"""What a reader is, and what it gives."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from llava_moe.data.schema import IMAGE_MARKER, DataError, Sample, parse_record
from llava_moe.registry import Registry

_EDGE = 1 << 16


class RecordError(DataError):
    """One record that cannot be used.

    Attributes:
        kind: "unreadable" (its bytes are no record), "placeholders" (markers and images differ in number), or
            "record" (any other rule of the schema).
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Locator(NamedTuple):
    """Where a record lies in its file: a byte range, or a row (then `size` is 0)."""

    start: int
    size: int = 0


@dataclass(frozen=True)
class EmbeddedImage:
    """An image that lies in the data file itself; stands where a `Path` would, and is opened like one."""

    name: str
    data: bytes = field(repr=False)

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The encoded image as a file; only reading is possible."""
        if mode != "rb":
            raise ValueError(f"an image inside a data file can only be opened for reading ('rb'), not {mode!r}")
        return io.BytesIO(self.data)

    def is_file(self) -> bool:
        return True

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Record:
    """A record as it lies in its file.

    Attributes:
        fields: `id`, `conversations`, and `image` where the images are files.
        images: those that lie in the data file; None where they are files.
    """

    fields: dict[str, Any]
    images: tuple[EmbeddedImage, ...] | None = None


class Reader(ABC):
    """Reads one file of a source. May be used from several threads, and after a fork.

    Args:
        path: the file, or the folder of a saved data set.
        image_folder: image names are relative to it; None where every image lies in the data file.
        split: of a saved data set that has several.

    Raises:
        DataError: the file is missing, or is not what its name says.
    """

    kind: ClassVar[str]
    has_splits: ClassVar[bool] = False
    block: ClassVar[int] = 32  # records that are worth handing to another process

    def __init__(self, path: Path, image_folder: Path | None = None, split: str | None = None) -> None:
        self.path = Path(path)
        self.image_folder = None if image_folder is None else Path(image_folder)
        self.split = split
        if not self.path.exists():
            raise DataError(f"{self.path}: no such data file; check the path")
        if split is not None and not self.has_splits:
            raise DataError(f"{self.path}: split={split!r} is for folders of save_to_disk; this is {self.kind}")

    @abstractmethod
    def scan(self) -> Iterator[Locator]:
        """Where the records lie, in order.

        Raises:
            DataError: the file as a whole cannot be read from here on.
        """

    @abstractmethod
    def read(self, locator: Locator) -> Record:
        """One record.

        Raises:
            RecordError: there is no whole record at that place.
        """

    def place(self, locator: Locator) -> str:
        """The record's place in words, for messages."""
        return f"row {locator.start}"

    def sample(self, locator: Locator) -> Sample:
        """One record, checked by the rules of `data/schema.py`; no image is opened.

        Raises:
            RecordError: a rule is broken; the message names file and record.
        """
        record = self.read(locator)
        fields, images = record.fields, record.images
        if images is not None:
            fields = {**fields, "image": [str(index) for index in range(len(images))]}
        elif self.image_folder is None and any(fields.get(key) is not None for key in ("image", "video")):
            where = f"{self.path}: {self.place(locator)}"
            raise RecordError("record", f"{where}: names image files, but the source has no image_folder; set it")
        try:
            sample = parse_record(fields, self.image_folder or Path(), str(self.path))
        except DataError as error:
            kind = "placeholders" if _markers_differ(fields) else "record"
            raise RecordError(kind, f"{error} ({self.place(locator)})") from error
        return sample if images is None else dataclasses.replace(sample, images=images)  # type: ignore[arg-type]

    def samples(self) -> Iterator[Sample]:
        """All samples in order, one at a time in memory."""
        return (self.sample(locator) for locator in self.scan())

    def breaks(self, starts: np.ndarray) -> np.ndarray:
        """Where in a sorted array of `Locator.start` records begin that are read from another part of the file.

        Records of one part are checked by one process, if reading one of them means reading the part.
        """
        return np.zeros(0, np.int64)

    def random_access(self) -> Reader:
        """A reader of the same file and locators whose `read` is fast in any order."""
        return self

    def mark(self) -> str:
        """Changes when the content does: the size and a digest of both ends of the file."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            head = file.read(_EDGE)
            file.seek(max(0, size - _EDGE))
            return f"{size}-{hashlib.sha1(head + file.read()).hexdigest()}"


SOURCES: Registry[type[Reader]] = Registry("source kind")


def aliased(fields: dict[str, Any]) -> dict[str, Any]:
    """`messages` and `images` under the names that LLaVA gives them."""
    renamed = dict(fields)
    for alias, name in (("messages", "conversations"), ("images", "image")):
        if renamed.get(name) is None and alias in renamed:
            renamed[name] = renamed.pop(alias)
    return renamed


def _markers_differ(fields: dict[str, Any]) -> bool:
    image, turns = fields.get("image"), fields.get("conversations")
    num_images = len(image) if isinstance(image, list) else int(isinstance(image, str))
    texts = [t.get("value", t.get("content")) for t in turns if isinstance(t, dict)] if isinstance(turns, list) else []
    return sum(text.count(IMAGE_MARKER) for text in texts if isinstance(text, str)) != num_images
