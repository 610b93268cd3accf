"""A parquet file as Arrow on disk: made once, memory-mapped, so that any row is read without the others in memory.

`datasets` does the same, but its scanner reads so far ahead that converting takes the memory of the whole file.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from filelock import FileLock

from llava_moe.data.schema import DataError

_BATCH = 32  # rows, which are in memory together while they are written


def cache_folder() -> Path:
    """Beside the cache of `datasets`: `HF_DATASETS_CACHE`, or below `HF_HOME`."""
    own = os.environ.get("HF_DATASETS_CACHE")
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return (Path(own) if own else Path(home).expanduser() / "datasets") / "llava_moe"


class ArrowRows:
    """The rows of a parquet file in any order.

    Args:
        path: the parquet file.
        mark: changes when its content does.

    Raises:
        DataError: the cache cannot be written.
    """

    def __init__(self, path: Path, mark: str) -> None:
        self._arrow = importlib.import_module("pyarrow")
        name = hashlib.sha1(f"{path.resolve()} {mark}".encode()).hexdigest()
        made = cache_folder() / f"{name}.arrow"
        try:
            made.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{made}.lock"):  # every rank comes here
                if not made.is_file():
                    self._write(path, made)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be turned into Arrow at {made} ({error}); it takes about as much room as its images, "
                "set HF_DATASETS_CACHE to a disk that has it"
            ) from error
        self._batches = self._arrow.ipc.open_file(self._arrow.memory_map(str(made)))
        count = self._batches.num_record_batches
        self._starts = [0, *accumulate(self._batches.get_batch(number).num_rows for number in range(count))]

    def _write(self, path: Path, made: Path) -> None:
        parquet = importlib.import_module("pyarrow.parquet")
        partial = made.with_suffix(f".partial-{os.getpid()}")
        try:
            with parquet.ParquetFile(path, memory_map=True) as source:
                schema = source.schema_arrow
                with self._arrow.OSFile(str(partial), "wb") as sink, self._arrow.ipc.new_file(sink, schema) as writer:
                    for batch in source.iter_batches(batch_size=_BATCH, use_threads=False):
                        writer.write_batch(batch)
            partial.rename(made)
        finally:
            partial.unlink(missing_ok=True)

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> dict[str, Any]:
        """One row, in plain values."""
        number = bisect_right(self._starts, index) - 1
        batch = self._batches.get_batch(number)
        return batch.slice(index - self._starts[number], 1).to_pylist()[0]
