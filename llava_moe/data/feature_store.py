"""Features of a frozen vision tower on disk: written once, memory-mapped by every later run.

A store is a directory with `features.npy` (num_images, num_tokens, channels) in float16 and `index.json` (image key to
row, fingerprint). The key is the SHA-1 of the image file's content, so moved or copied images keep their features. The
fingerprint says what the features depend on besides the image (tower weights, image mode, processor settings); a reader
with another fingerprint is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from llava_moe.data.schema import DataError

_FEATURES = "features.npy"
_INDEX = "index.json"


def image_key(path: Path) -> str:
    """SHA-1 of the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


class FeatureStoreWriter:
    """Writes a store for a known number of different images.

    The store appears under its name only when it is complete; as a context manager, an exception discards it.

    Args:
        path: the directory to create.
        fingerprint: everything the features depend on besides the image.
        num_images, num_tokens, channels: the shape.

    Raises:
        DataError: `path` exists.
    """

    def __init__(self, path: str | Path, fingerprint: str, *, num_images: int, num_tokens: int, channels: int) -> None:
        self.path = Path(path)
        if self.path.exists():
            raise DataError(f"feature store {self.path} exists already; delete it or write to another path")
        self._fingerprint = fingerprint
        self._partial = self.path.with_name(f"{self.path.name}.partial-{os.getpid()}")
        self._partial.mkdir(parents=True)
        self._rows: dict[str, int] = {}
        self._features = np.lib.format.open_memmap(
            self._partial / _FEATURES, mode="w+", dtype=np.float16, shape=(num_images, num_tokens, channels)
        )

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def add(self, keys: Sequence[str], features: torch.Tensor | np.ndarray) -> None:
        """Appends features (len(keys), num_tokens, channels).

        Raises:
            DataError: the shape is wrong, a key is there already, there are too many, or a value overflows float16.
        """
        array = features.detach().float().cpu().numpy() if isinstance(features, torch.Tensor) else np.asarray(features)
        expected = (len(keys), *self._features.shape[1:])
        if array.shape != expected:
            raise DataError(f"feature store {self.path}: features of shape {array.shape}, expected {expected}")
        first = len(self._rows)
        if first + len(keys) > len(self._features):
            raise DataError(f"feature store {self.path}: more than the announced {len(self._features)} images")
        twice = [key for index, key in enumerate(keys) if key in self._rows or key in keys[:index]]
        if twice:
            raise DataError(
                f"feature store {self.path}: image {twice[0]} added twice; add each content once (image_key)"
            )
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.isfinite(half).all():
            raise DataError(
                f"feature store {self.path}: values are not finite in float16 (largest magnitude "
                f"{np.abs(array).max():.3g}); train this tower without the store"
            )
        self._features[first : first + len(keys)] = half
        self._rows.update({key: first + index for index, key in enumerate(keys)})

    def close(self) -> None:
        """Completes the store.

        Raises:
            DataError: fewer images than announced were added.
        """
        if len(self._rows) != len(self._features):
            raise DataError(
                f"feature store {self.path}: {len(self._rows)} of the announced {len(self._features)} images were added"
            )
        self._features.flush()
        index = {"fingerprint": self._fingerprint, "shape": list(self._features.shape), "rows": self._rows}
        (self._partial / _INDEX).write_text(json.dumps(index), encoding="utf-8")
        self._partial.rename(self.path)

    def discard(self) -> None:
        """Removes what was written so far."""
        shutil.rmtree(self._partial)

    def __enter__(self) -> FeatureStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.close()
        except DataError:
            self.discard()
            raise


class FeatureStore:
    """Read side of a store.

    Args:
        path: the directory.
        fingerprint: of the tower and processor that would be run instead.

    Raises:
        DataError: no complete store is there, or it was written for something else.
    """

    def __init__(self, path: str | Path, fingerprint: str) -> None:
        self.path = Path(path)
        try:
            index = json.loads((self.path / _INDEX).read_text(encoding="utf-8"))
            features = np.load(self.path / _FEATURES, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.path} is not a readable feature store ({error}); delete it and write it again"
            ) from error
        if index["fingerprint"] != fingerprint:
            raise DataError(
                f"feature store {self.path} was written for another tower, image mode or processor (fingerprint "
                f"{index['fingerprint']!r}, now {fingerprint!r}); delete it and write it again"
            )
        if list(features.shape) != index["shape"]:
            raise DataError(
                f"feature store {self.path}: array {features.shape}, index {index['shape']}; write it again"
            )
        self._features = features
        self._rows: dict[str, int] = index["rows"]

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(num_tokens, channels) of one image."""
        return self._features.shape[1], self._features.shape[2]

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def get(self, keys: Sequence[str]) -> torch.Tensor:
        """Features of images in the given order: (len(keys), num_tokens, channels) float32.

        Raises:
            DataError: an image is not in the store.
        """
        missing = [key for key in keys if key not in self._rows]
        if missing:
            raise DataError(
                f"feature store {self.path} lacks the image with key {missing[0]}; write it again for this data"
            )
        return self.take(np.array([self._rows[key] for key in keys], np.int64))

    def row(self, key: str) -> int | None:
        """The row of an image, for `take`; None if it is not in the store."""
        return self._rows.get(key)

    def take(self, rows: np.ndarray) -> torch.Tensor:
        """Features by their rows: (len(rows), num_tokens, channels) float32."""
        return torch.from_numpy(self._features[rows].astype(np.float32))
