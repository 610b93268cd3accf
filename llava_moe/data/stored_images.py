"""Which rows of a feature store belong to the images of each sample."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import torch

from llava_moe.data.feature_store import FeatureStore, image_key
from llava_moe.data.schema import DataError, Sample


class StoredImages:
    """Samples are added in their order; what is kept is two arrays, which worker processes share.

    Args:
        store: of the features.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self._rows, self._ends = array("q"), array("q", [0])
        self._known: dict[Path, int] = {}

    def add(self, sample: Sample) -> None:
        """The next sample.

        Raises:
            DataError: it is a video, or an image is not in the store. The sample is counted all the same.
        """
        where = f"{sample.source}: record {sample.id!r}"
        try:
            if sample.video is not None:
                raise DataError(f"{where}: is a video, and only features of images are stored; leave feature_cache out")
            for path in sample.images:
                self._rows.append(self._row(path, where))
        finally:
            self._ends.append(len(self._rows))

    def _row(self, path: Path, where: str) -> int:
        if path not in self._known:
            row = self.store.row(image_key(path))
            if row is None:
                raise DataError(
                    f"{where}: image {path} is not in the feature store {self.store.path}; write the store again for "
                    "this data"
                )
            self._known[path] = row
        return self._known[path]

    def finish(self) -> None:
        """No more samples will come."""
        self._known = {}

    def features(self, index: int) -> torch.Tensor:
        """Of the images of a sample: (n, N, C) float32."""
        return self.store.take(np.asarray(self._rows[self._ends[index] : self._ends[index + 1]], np.int64))
