"""From the path that a recipe names to readers."""

from __future__ import annotations

import glob
from pathlib import Path

from llava_moe.data.schema import DataError
from llava_moe.data.sources.base import SOURCES, Reader

_KNOWN = "*.json, *.jsonl, *.parquet, *.tar, and folders of Dataset.save_to_disk"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


def open_files(path: str | Path, image_folder: str | Path | None = None, split: str | None = None) -> list[Reader]:
    """The readers of a source: one for each file that `path` names.

    Args:
        path: a file, a pattern (`shards/*.tar`; its files in the order of their names), or a saved data set.
        image_folder: see `Reader`.
        split: of a saved data set that has several.

    Raises:
        DataError: nothing is there, or it is of no known kind.
    """
    folder, text = None if image_folder is None else Path(image_folder), str(path)
    is_pattern = glob.has_magic(text) and not Path(text).exists()
    names = sorted(glob.glob(text, recursive=True)) if is_pattern else [text]
    if not names:
        raise DataError(f"{text}: no file matches the pattern; check the path")
    return [SOURCES.get(kind_of(Path(name)))(Path(name), folder, split) for name in names]


def kind_of(path: Path) -> str:
    """The name in `SOURCES` that goes with a file or folder.

    Raises:
        DataError: no kind does.
    """
    if path.is_dir():
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return "hf"
        raise DataError(
            f"{path}: a folder, but not one of Dataset.save_to_disk (no state.json); name the data file in it, or a "
            f"pattern such as {path}/*.parquet"
        )
    if path.name.lower().endswith(_COMPRESSED):
        raise DataError(f"{path}: the records of a compressed tar cannot be read in any order; decompress it to .tar")
    kind = path.suffix.removeprefix(".").lower()
    if kind == "hf" or kind not in SOURCES.names():
        raise DataError(f"{path}: what kind of data is this? Known: {_KNOWN}")
    return kind
