"""Tables: parquet files, and data sets that `Dataset.save_to_disk` wrote. They need the `datasets` package.

A parquet file is scanned and checked in its row groups, each of which is read whole; in any other order that would read
a group for every row. For training it is therefore turned into Arrow once (`arrow_cache.py`).
"""

from __future__ import annotations

import hashlib
import importlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from llava_moe.data.schema import DataError
from llava_moe.data.sources.arrow_cache import ArrowRows
from llava_moe.data.sources.base import SOURCES, EmbeddedImage, Locator, Reader, Record, RecordError, aliased

_ROW_GROUPS = 2  # in memory at a time


def _needed(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: reading tables needs the `datasets` package; run `pip install datasets`") from error


class _Table(Reader):
    """Rows with the columns of a LLaVA record; images may be columns of bytes."""

    def _row(self, row: dict[str, Any], locator: Locator) -> Record:
        fields = {name: value for name, value in aliased(row).items() if value is not None}
        fields.setdefault("id", f"{self.path.name}#{locator.start}")
        held = fields.get("image")
        cells = held if isinstance(held, list) else [] if held is None else [held]
        if not cells or all(isinstance(cell, str) for cell in cells):
            return Record(fields)
        name = f"{self.path}:row {locator.start}"
        images = tuple(self._image(cell, f"{name}, image {index}") for index, cell in enumerate(cells))
        return Record({key: value for key, value in fields.items() if key != "image"}, images)

    def _image(self, cell: Any, name: str) -> EmbeddedImage:
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(cell, dict) and data is None and cell.get("path"):
            try:  # an image column that was saved without embedding its files
                data = Path(cell["path"]).read_bytes()
            except OSError as error:
                raise RecordError("unreadable", f"{name}: {error}") from error
        if not isinstance(data, bytes):
            found = type(data if isinstance(cell, dict) else cell).__name__
            raise RecordError("unreadable", f"{name}: expected encoded bytes or a file name, found {found}")
        return EmbeddedImage(name, data)


@SOURCES.register("parquet")
class ParquetFile(_Table):
    """One parquet file."""

    kind = "parquet"
    block = 4096

    def __init__(self, path: Path, image_folder: Path | None = None, split: str | None = None) -> None:
        super().__init__(path, image_folder, split)
        parquet, arrow = _needed("pyarrow.parquet", self.path), _needed("pyarrow", self.path)
        self._error = arrow.ArrowException
        try:
            self._file = parquet.ParquetFile(self.path, memory_map=True)
        except (self._error, OSError) as error:
            raise DataError(f"{self.path}: not a readable parquet file ({error})") from error
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "image_folder": self.image_folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["image_folder"])  # type: ignore[misc]

    def scan(self) -> Iterator[Locator]:
        return (Locator(row) for row in range(self._starts[-1]))

    def breaks(self, starts: np.ndarray) -> np.ndarray:
        group = np.searchsorted(self._starts, starts, side="right")
        return np.flatnonzero(np.diff(group)) + 1

    def read(self, locator: Locator) -> Record:
        group = bisect_right(self._starts, locator.start) - 1
        if not 0 <= locator.start < self._starts[-1]:
            raise RecordError("unreadable", f"{self.path}: has no {self.place(locator)}")
        try:
            table = self._group(group)
        except (self._error, OSError) as error:
            said = f"{self.place(locator)}: row group {group} cannot be read ({error})"
            raise RecordError("unreadable", f"{self.path}: {said}") from error
        return self._row(table.slice(locator.start - self._starts[group], 1).to_pylist()[0], locator)

    def _group(self, group: int) -> Any:
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._file.read_row_group(group, use_threads=False)  # also in a fork
                while len(self._groups) > _ROW_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            return self._groups[group]

    def random_access(self) -> Reader:
        return _RowsInAnyOrder(self, ArrowRows(self.path, self.mark()))


@SOURCES.register("hf")
class SavedDataset(_Table):
    """A folder of `Dataset.save_to_disk`, or one split of a `DatasetDict`'s."""

    kind = "hf"
    has_splits = True

    def __init__(self, path: Path, image_folder: Path | None = None, split: str | None = None) -> None:
        super().__init__(path, image_folder, split)
        datasets = _needed("datasets", self.path)
        try:
            found = datasets.load_from_disk(str(self.path))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{self.path}: not a readable data set of save_to_disk ({error})") from error
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise DataError(f"{self.path}: split={split!r}; choose one of {', '.join(map(str, found))}")
            found = found[split]
        elif split is not None:
            raise DataError(f"{self.path}: split={split!r}, but this is a single data set; leave split out")
        self._rows = found.with_format("arrow")  # plain values: images stay encoded

    def scan(self) -> Iterator[Locator]:
        return (Locator(row) for row in range(len(self._rows)))

    def read(self, locator: Locator) -> Record:
        if not 0 <= locator.start < len(self._rows):
            raise RecordError("unreadable", f"{self.path}: has no {self.place(locator)}")
        return self._row(self._rows[locator.start].to_pylist()[0], locator)

    def mark(self) -> str:
        names = sorted(file for file in self.path.rglob("*") if file.suffix == ".arrow" or file.name == "state.json")
        sizes = "".join(f"{file.relative_to(self.path)}:{file.stat().st_size};" for file in names)
        return hashlib.sha1(f"{sizes}{self.split}".encode()).hexdigest()


class _RowsInAnyOrder(_Table):
    """The rows of a parquet file out of `arrow_cache.py`."""

    kind = "parquet"

    def __init__(self, of: ParquetFile, rows: ArrowRows) -> None:
        super().__init__(of.path, of.image_folder)
        self._rows = rows

    def scan(self) -> Iterator[Locator]:
        return (Locator(row) for row in range(len(self._rows)))

    def read(self, locator: Locator) -> Record:
        return self._row(self._rows.row(locator.start), locator)
