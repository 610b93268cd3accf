"""Conversations as a map-style data set: everything that can be checked is checked before the first step."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from torch.utils.data import Dataset

from llava_moe.data.broken import broken_item
from llava_moe.data.check import raise_problems
from llava_moe.data.feature_store import FeatureStore
from llava_moe.data.image import load_image
from llava_moe.data.image_tiles import read_size
from llava_moe.data.image_video import load_frames, num_shown
from llava_moe.data.processing import LlavaMoeProcessor
from llava_moe.data.records import Places, Records, Source, open_plain, walk
from llava_moe.data.schema import DataError, Sample
from llava_moe.data.stored_images import StoredImages
from llava_moe.data.visuals import Shape, Visual, shape_of

Overlong = Literal["error", "skip", "truncate"]
TILES_ARE_NOT_STORED = "features of whole images are stored, and this model is shown tiles; leave feature_cache out"


class ConversationDataset(Dataset[dict[str, Any]]):
    """Samples of one or more LLaVA data files.

    The constructor parses every record, looks for every image file and renders every conversation; only samples that
    might be longer than `max_length` are tokenised there (a token has at least one byte, so most are known not to be).
    Images are decoded in `__getitem__`; where they are cut into tiles, the constructor reads the size of each. Records
    are not kept but read from their files again, so the data may be larger than memory.

    Args:
        sources: (data file, image folder) pairs.
        processor: of the model to be trained.
        max_length: the longest sequence, counted after the images are expanded.
        overlong: what happens to longer samples. "error": refuse the data. "skip": leave them out. "truncate": cut the
            end off; samples whose images or whole answers would be cut are left out. Both are counted in `report`.
        feature_store: gives "vision_features" instead of "pixel_values".

    Attributes:
        hands_over: a sample that breaks when it is read (a picture that was cut off since the check) comes as the item
            of `broken.broken_item` instead of an error, for the run to refuse or to count; see `training/skipping.py`.

    Raises:
        DataError: one error that lists the first ten problems.
    """

    hands_over = False

    def __init__(
        self,
        sources: Sequence[Source],
        processor: LlavaMoeProcessor,
        max_length: int,
        overlong: Overlong = "error",
        feature_store: FeatureStore | None = None,
    ) -> None:
        if overlong not in get_args(Overlong):
            raise DataError(f"overlong is {overlong!r}; choose one of {', '.join(get_args(Overlong))}")
        self.processor = processor
        self.max_length = max_length
        self.overlong = overlong
        self.feature_store = feature_store
        readers, problems = open_plain(sources)
        self._report = {"records": len(problems), "used": 0, "skipped_overlong": 0, "truncated": 0}
        self._stored = None if feature_store is None else StoredImages(feature_store)
        places, lengths, visuals = Places(), array("i"), array("h")
        if self._stored is not None and processor.tiling is not None:
            problems.append(TILES_ARE_NOT_STORED)
        for found in walk(readers):
            self._report["records"] += 1
            try:
                length = self._admit(found.sample, overlong) if found.sample is not None else None
                if found.sample is not None and length is not None:
                    places.add(found.file, found.locator)
                    lengths.append(length)
                    visuals.append(found.sample.num_visuals)
                    if self._stored is not None:
                        self._stored.add(found.sample)
            except DataError as error:
                problems.append(str(error))
            if found.problem:
                problems.append(found.problem)
        self.samples: Sequence[Sample] = Records(readers, places.table())
        self.lengths: np.ndarray = np.array(lengths, np.int32)
        """Tokens of each sample, estimated for short ones: good enough to group samples of similar length."""
        self.visuals: np.ndarray = np.array(visuals, np.int16)
        """Images and videos of each sample."""
        self._report["used"] = len(self.samples)
        if self._stored is not None:
            self._stored.finish()
        raise_problems(problems, self._report["records"])
        if not len(self.samples):
            raise DataError(
                f"no sample is left of {self._report['records']} record(s) in {[str(path) for path, _ in sources]}; "
                f"{self._report['skipped_overlong']} were longer than max_length {max_length}"
            )

    def _admit(self, sample: Sample, overlong: Overlong) -> int | None:
        """The length of a sample, None if it is left out."""
        shapes = self._shapes(sample)
        try:
            counts = self.processor.image_tokens(shapes)
            bound = self.processor.max_encoded_length(sample.turns, sample.num_visuals, counts)
            if bound <= self.max_length:
                return sum(counts) + max(1, (bound - sum(counts)) // 4)
            encoded = self.processor.encode_text(sample.turns, sample.num_visuals, counts)
        except DataError as error:
            raise DataError(f"{sample.source}: record {sample.id!r}: {error}") from error
        length = len(encoded["input_ids"])
        if length <= self.max_length:
            return length
        if overlong == "error":
            raise DataError(
                f"{sample.source}: record {sample.id!r}: {length} tokens, more than max_length {self.max_length}; "
                "raise max_length or set overlong to skip or truncate"
            )
        beyond = encoded["input_ids"][self.max_length :]
        cuts_image = bool((beyond == self.processor.image_token_id).any())
        nothing_left = self.processor.answer_start(sample.turns, counts) >= self.max_length
        if overlong == "skip" or cuts_image or nothing_left:
            self._report["skipped_overlong"] += 1
            return None
        self._report["truncated"] += 1
        return self.max_length

    def _shapes(self, sample: Sample) -> list[Shape]:
        """What decides the tokens of the visuals; a video file is taken to have as many frames as are shown at most."""
        if sample.video is not None:
            return [num_shown(sample.video, self.processor.num_frames)]
        if self.processor.tiling is None:
            return [(1, 1)] * len(sample.images)  # whatever its size, an image has one number of tokens
        return [read_size(path, sample.id) for path in sample.images]

    def _visuals(self, sample: Sample) -> list[Visual]:
        try:
            if sample.video is not None:
                return [load_frames(sample.video, self.processor.num_frames, sample.id)]
            return [load_image(path, sample.id) for path in sample.images]
        except DataError as error:
            raise DataError(f"{sample.source}: {error}") from error

    def report(self) -> dict[str, int]:
        """Counts: records, used, skipped_overlong, truncated."""
        return dict(self._report)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: input_ids (S,), labels (S,), sample_id; of its images and videos what the processor gives.

        That is pixel_values (n, 3, H, W) and with tiles what belongs to it, or vision_features (n, N, C) of the store.

        Raises:
            DataError: an image cannot be decoded; names the record and the file. With `hands_over` nothing is raised
                and the item is that of `broken.broken_item`.
        """
        try:
            return self._item(index, self.samples[index])
        except DataError as error:
            if not self.hands_over:
                raise
            return broken_item(error)

    def _item(self, index: int, sample: Sample) -> dict[str, Any]:
        item: dict[str, Any] = {"sample_id": sample.id}
        visuals = [] if self.feature_store is not None else self._visuals(sample)
        shapes = [shape_of(visual) for visual in visuals] or self._shapes(sample)
        try:
            counts = self.processor.image_tokens(shapes)
            encoded = self.processor.encode_text(sample.turns, sample.num_visuals, counts)
            item |= self.processor.encode_visuals(visuals)
        except DataError as error:
            raise DataError(f"{sample.source}: record {sample.id!r}: {error}") from error
        if len(encoded["input_ids"]) > self.max_length and self.overlong != "truncate":
            # only a tokenizer whose normaliser lengthens the text gets past the bound used by the constructor
            raise DataError(
                f"{sample.source}: record {sample.id!r}: {len(encoded['input_ids'])} tokens, more than max_length "
                f"{self.max_length}; raise max_length or set overlong to truncate"
            )
        item["input_ids"] = encoded["input_ids"][: self.max_length]
        item["labels"] = encoded["labels"][: self.max_length]
        if sample.images and self._stored is not None:
            item["vision_features"] = self._stored.features(index)
        return item
