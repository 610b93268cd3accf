"""Training on a clean index: samples are read from their files one by one, and nothing is checked a second time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from llava_moe.data.check import raise_problems
from llava_moe.data.checking import processor_mark
from llava_moe.data.dataset import TILES_ARE_NOT_STORED, ConversationDataset, Overlong
from llava_moe.data.feature_store import FeatureStore
from llava_moe.data.image_tiles import read_size
from llava_moe.data.index import RecordIndex
from llava_moe.data.parallel import in_order, usable_cores
from llava_moe.data.processing import LlavaMoeProcessor
from llava_moe.data.record_check import encode
from llava_moe.data.schema import DataError
from llava_moe.data.stored_images import StoredImages

OnProblem = Literal["refuse", "skip"]
_BLOCK = 64


class IndexedDataset(ConversationDataset):
    """The samples of an index that `llava-moe check-data` wrote.

    Args:
        index: its folder.
        processor: of the model to be trained.
        max_length: the longest sequence.
        overlong: as in `ConversationDataset`; the index must have been written with the same.
        feature_store: gives "vision_features" instead of "pixel_values".
        on_problem: what to do where the check left records out. "refuse": stop before the first step. "skip": train on
            the rest; how many were left out, and why, is in `report`. No other sample takes their place.

    Raises:
        DataError: the check left records out and `on_problem` is "refuse"; or the index was written for another
            processor, length or policy, or without a processor.
    """

    def __init__(
        self,
        index: str | Path,
        processor: LlavaMoeProcessor,
        max_length: int,
        overlong: Overlong = "error",
        feature_store: FeatureStore | None = None,
        on_problem: OnProblem = "refuse",
    ) -> None:
        if on_problem not in get_args(OnProblem):
            raise DataError(f"on_problem is {on_problem!r}; choose one of {', '.join(get_args(OnProblem))}")
        self.processor = processor
        self.max_length = max_length
        self.overlong = overlong
        self.feature_store = feature_store
        self.index = RecordIndex(index)
        self._check_measure()
        tally = self.index.tally
        if tally.left_out and on_problem == "refuse" and not self._all_skipped():
            raise DataError(
                f"{self.index.folder}: the check left records out ({dict(tally.left_out)} of {tally.records}); mend "
                "the data, or set data.on_problem to skip to train without them"
            )
        self.samples = self.index  # a sequence that reads from disk
        assert self.index.lengths is not None
        self.lengths = self.index.lengths
        self.visuals = self.index.rows["visuals"]
        self._stored = None if feature_store is None else self._in_store(feature_store)

    def _in_store(self, feature_store: FeatureStore) -> StoredImages:
        """The rows of all images, which takes one pass over the records.

        Raises:
            DataError: one error for all samples whose features are not there.
        """
        stored, problems = StoredImages(feature_store), []
        if self.processor.tiling is not None:
            problems.append(TILES_ARE_NOT_STORED)
        for sample in self.samples:
            try:
                stored.add(sample)
            except DataError as error:
                problems.append(str(error))
        stored.finish()
        raise_problems(problems, len(self.samples))
        return stored

    def _all_skipped(self) -> bool:
        """Whether all that was left out was too long, and the recipe itself says to skip that."""
        return set(self.index.tally.left_out) == {"overlong"} and self.overlong in ("skip", "truncate")

    def _check_measure(self) -> None:
        measure, folder = self.index.measure, self.index.folder
        if measure.fingerprint is None:
            raise DataError(f"{folder} holds no lengths; write it with --processor and --max-length")
        wanted = {
            "template, tokenizer or image mode": (measure.fingerprint, processor_mark(self.processor)),
            "max_length": (measure.max_length, self.max_length),
            "overlong": (measure.overlong, self.overlong),
        }
        for name, (found, now) in wanted.items():
            if found != now:
                raise DataError(
                    f"{folder} was written for another {name} ({found} there, {now} now); run llava-moe check-data "
                    "again"
                )

    def report(self) -> dict[str, Any]:
        """Counts: records, used, skipped_overlong, truncated, and left_out_KIND for every other kind of problem."""
        tally = self.index.tally
        return {
            "records": tally.records,
            "used": tally.kept,
            "skipped_overlong": tally.left_out.get("overlong", 0),
            "truncated": tally.truncated,
            **{f"left_out_{kind}": count for kind, count in tally.left_out.items() if kind != "overlong"},
        }


def has_visuals(dataset: ConversationDataset) -> np.ndarray:
    """Whether each sample has an image or a video, bool."""
    return dataset.visuals > 0


def exact_lengths(dataset: ConversationDataset, workers: int | None = None) -> np.ndarray:
    """Tokens of every sample, int32, as packing needs them; tokenises all of them where no index knows them already.

    Args:
        dataset: of either kind.
        workers: processes, 0 for this one alone; None: one for each core where there is enough to do.
    """
    if isinstance(dataset, IndexedDataset):
        return np.asarray(dataset.lengths)
    if workers is None:
        workers = min(usable_cores(), len(dataset) // 512)
    blocks = [range(start, min(start + _BLOCK, len(dataset))) for start in range(0, len(dataset), _BLOCK)]
    found = in_order(partial(_lengths, dataset), blocks, workers)
    return np.concatenate([*found, np.zeros(0, np.int32)]).astype(np.int32)


def _lengths(dataset: ConversationDataset, block: range) -> np.ndarray:
    lengths = np.empty(len(block), np.int32)
    tiled = dataset.processor.tiling is not None
    for place, number in enumerate(block):
        sample = dataset.samples[number]
        sizes = [read_size(image, sample.id) if tiled else (1, 1) for image in sample.images]
        lengths[place] = min(len(encode(dataset.processor, sample, sizes)[0]), dataset.max_length)
    return lengths
