"""The clean index that `llava-moe check-data` writes: where the records lie that may be trained on, and their lengths.

An index is a folder with `rows.npy` (one row for each sample of an epoch, in order, see `ROW`) and
`index.json` (the files and what marks their content, what was left out and why, and what the lengths depend on). It
holds no record: they are fetched from their files one by one, so the sources may be larger than memory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from llava_moe.data.schema import DataError, Sample
from llava_moe.data.sources import SOURCES, Locator, Reader

_ROWS, _INDEX, _FORMAT = "rows.npy", "index.json", 1
ROW = np.dtype([("file", "<i4"), ("start", "<i8"), ("size", "<i8"), ("length", "<i4"), ("visuals", "<i2")])
"""One sample: number of its file, its locator, its tokens with images expanded (0: not measured), its images."""


@dataclass(frozen=True)
class Measure:
    """What the lengths of an index depend on; all None where they were not measured.

    Attributes:
        fingerprint: of the processor: tokenizer, template, image mode.
        max_length: the longest sample admitted.
        overlong: what was done with longer ones: error, skip or truncate.
    """

    fingerprint: str | None = None
    max_length: int | None = None
    overlong: str | None = None


@dataclass(frozen=True)
class Tally:
    """What a check counted.

    Attributes:
        records: drawn by the mixture, repeats counted.
        kept: rows of the index.
        left_out: records by the kind of their problem, repeats counted.
        truncated: kept records that are cut at the maximal length.
    """

    records: int
    kept: int
    left_out: Mapping[str, int]
    truncated: int = 0


def write_index(
    folder: str | Path, readers: Sequence[Reader], rows: np.ndarray, measure: Measure, tally: Tally
) -> Path:
    """Writes an index; it appears under its name only when it is whole, and takes the place of an older index.

    Args:
        folder: to be written.
        readers: of the files, in the order of their numbers.
        rows: of `ROW`.
        measure, tally: see there.

    Raises:
        DataError: `folder` exists and is no index.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / _INDEX).is_file():
        raise DataError(f"{folder} exists and holds no index; choose another place")
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    np.save(partial / _ROWS, rows)
    files = [
        {
            "path": str(reader.path.resolve()),
            "kind": reader.kind,
            "image_folder": None if reader.image_folder is None else str(reader.image_folder.resolve()),
            "split": reader.split,
            "mark": reader.mark(),
        }
        for reader in readers
    ]
    content = {
        "format": _FORMAT,
        "files": files,
        "measure": dataclasses.asdict(measure),
        "tally": {**dataclasses.asdict(tally), "left_out": dict(tally.left_out)},
    }
    (partial / _INDEX).write_text(json.dumps(content, indent=2), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return folder


class RecordIndex(Sequence[Sample]):
    """The samples of an index; each is read from its file when it is asked for.

    Args:
        folder: written by `write_index`.

    Raises:
        DataError: there is no whole index, or a file has changed since.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            content = json.loads((self.folder / _INDEX).read_text(encoding="utf-8"))
            self.rows: np.ndarray = np.load(self.folder / _ROWS, mmap_mode="r")
            if content["format"] != _FORMAT or self.rows.dtype != ROW:
                raise ValueError(f"its format is {content['format']}, expected {_FORMAT}")
            self.measure = Measure(**content["measure"])
            self.tally = Tally(**content["tally"])
            self._files: list[dict[str, Any]] = content["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.folder} is not a readable index ({error}); write it with llava-moe check-data"
            ) from error
        self._readers: dict[int, Reader] = {}
        for file in self._files:
            if self._open(file).mark() != file["mark"]:
                raise DataError(f"{file['path']} has changed since the index {self.folder} was written; check it again")

    @staticmethod
    def _open(file: Mapping[str, Any]) -> Reader:
        folder = file["image_folder"]
        kind = SOURCES.get(file["kind"])
        return kind(Path(file["path"]), None if folder is None else Path(folder), file["split"])

    @property
    def lengths(self) -> np.ndarray | None:
        """Tokens of each sample, exact; None where they were not measured."""
        return None if self.measure.fingerprint is None else self.rows["length"]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Reads a sample.

        Raises:
            RecordError: its file has changed under the index.
        """
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = self.rows[index]
        number = int(row["file"])
        if number not in self._readers:
            self._readers[number] = self._open(self._files[number]).random_access()
        return self._readers[number].sample(Locator(int(row["start"]), int(row["size"])))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}  # a worker process opens files and memory map for itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]
