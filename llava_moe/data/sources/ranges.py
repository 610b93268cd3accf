"""Files whose records are byte ranges: jsonl, webdataset tar; `json_list.py` has LLaVA's JSON list."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from llava_moe.data.schema import IMAGE_MARKER, DataError
from llava_moe.data.sources.base import SOURCES, EmbeddedImage, Locator, Reader, Record, RecordError, aliased

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
_BLOCK = 1 << 20


class _ByteRanges(Reader):
    """Reads by position and not from where the last read ended: forked workers and threads share one open file."""

    def __init__(self, path: Path, image_folder: Path | None = None, split: str | None = None) -> None:
        super().__init__(path, image_folder, split)
        self._file = self.path.open("rb")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "image_folder": self.image_folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["image_folder"])  # type: ignore[misc]

    def _bytes(self, locator: Locator) -> bytes:
        data = os.pread(self._file.fileno(), locator.size, locator.start)
        if len(data) != locator.size:
            raise RecordError("unreadable", f"{self.path}: ends before byte {locator.start + locator.size}")
        return data


@SOURCES.register("jsonl")
class JsonLines(_ByteRanges):
    """One JSON object per line; empty lines are passed over."""

    kind = "jsonl"
    _line = (0, 1)  # the last place that was asked for, and its line

    def scan(self) -> Iterator[Locator]:
        start = 0
        with self.path.open("rb") as file:
            for line in file:
                if line.strip():
                    yield Locator(start, len(line))
                start += len(line)

    def place(self, locator: Locator) -> str:
        return f"line {self._line_of(locator.start)}"

    def _line_of(self, start: int) -> int:
        known, line = self._line if self._line[0] <= start else (0, 1)  # broken records mostly come in their order
        with self.path.open("rb") as file:
            file.seek(known)
            blocks = iter(lambda: file.read(min(_BLOCK, start - file.tell())), b"")
            line += sum(block.count(b"\n") for block in blocks)
        self._line = (start, line)
        return line

    def read(self, locator: Locator) -> Record:
        try:
            fields = json.loads(self._bytes(locator))
        except json.JSONDecodeError as error:
            line = self._line_of(locator.start) + error.lineno - 1
            said = f"not valid JSON at line {line}, column {error.colno}: {error.msg}"
            raise RecordError("unreadable", f"{self.path}: {said}") from error
        except UnicodeDecodeError as error:
            said = f"{self.place(locator)} is not UTF-8; convert the file"
            raise RecordError("unreadable", f"{self.path}: {said}") from error
        if not isinstance(fields, dict):
            said = f"{self.place(locator)} is {type(fields).__name__}, expected an object"
            raise RecordError("unreadable", f"{self.path}: {said}")
        return Record(fields)


@SOURCES.register("tar")
class TarShard(_ByteRanges):
    """A webdataset shard: members with one key lie next to each other and make one record."""

    kind = "tar"

    def scan(self) -> Iterator[Locator]:
        start, end, key = -1, 0, None
        try:
            with tarfile.open(self.path, "r:") as shard:
                for member in shard:
                    shard.members = []  # type: ignore[attr-defined]  # tarfile would keep the header of every member
                    if not member.isfile():
                        continue
                    if key is not None and key_of(member.name) != key:
                        yield Locator(start, end - start)
                    if key_of(member.name) != key:
                        start, key = member.offset, key_of(member.name)
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        except tarfile.TarError as error:
            raise DataError(f"{self.path}: not a readable tar file ({error})") from error
        if key is not None:
            # a shard that was cut off: what is there is handed over, and `read` says what is missing
            yield Locator(start, min(end, self.path.stat().st_size) - start)

    def place(self, locator: Locator) -> str:
        return f"byte {locator.start}"

    def read(self, locator: Locator) -> Record:
        key, texts, images = "", {}, []
        try:
            with tarfile.open(fileobj=io.BytesIO(self._bytes(locator)), mode="r:") as block:
                for member in block:
                    file, suffix = block.extractfile(member), PurePosixPath(member.name).suffix.lower()
                    if file is None:
                        continue
                    key, data = key_of(member.name), file.read()
                    if suffix in IMAGE_SUFFIXES:
                        images.append(EmbeddedImage(f"{self.path}:{member.name}", data))
                    elif suffix in (".json", ".txt"):
                        texts[suffix] = data
        except tarfile.TarError as error:
            raise RecordError("unreadable", f"{self.path}: {self.place(locator)}: cut off ({error})") from error
        fields = self._fields(key, texts, len(images))
        if images:
            return Record({name: value for name, value in fields.items() if name != "image"}, tuple(images))
        return Record(fields)

    def _fields(self, key: str, texts: dict[str, bytes], num_images: int) -> dict[str, Any]:
        where = f"{self.path}: record {key!r}"
        if not texts:
            raise RecordError("unreadable", f"{where}: has neither a .json nor a .txt member")
        try:
            fields = json.loads(texts[".json"]) if ".json" in texts else _caption(texts[".txt"].decode(), num_images)
        except ValueError as error:  # of JSON or of UTF-8
            raise RecordError("unreadable", f"{where}: not valid JSON or UTF-8: {error}") from error
        if not isinstance(fields, dict):
            raise RecordError("unreadable", f"{where}: .json holds a {type(fields).__name__}, expected an object")
        return {"id": key, **aliased(fields)}


def key_of(name: str) -> str:
    """What the members of one record share: everything before the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.split('.')[0]}"


def _caption(text: str, num_images: int) -> dict[str, Any]:
    question = "\n".join([IMAGE_MARKER] * num_images)
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": text.strip()}]}
