"""Conversations as a map-style data set: everything that can be checked is checked before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.utils.data import Dataset

from llava_moe.data.check import Source, raise_problems, read_sources
from llava_moe.data.feature_store import FeatureStore, image_key
from llava_moe.data.image import load_image
from llava_moe.data.processing import LlavaMoeProcessor
from llava_moe.data.schema import DataError, Sample

Overlong = Literal["error", "skip", "truncate"]


class ConversationDataset(Dataset[dict[str, Any]]):
    """Samples of one or more LLaVA data files.

    The constructor parses every record, looks for every image file and renders every conversation; only samples that
    might be longer than `max_length` are tokenised there (a token has at least one byte, so most are known not to be).
    Images are decoded in `__getitem__`.

    Args:
        sources: (data file, image folder) pairs.
        processor: of the model to be trained.
        max_length: the longest sequence, counted after the images are expanded.
        overlong: what happens to longer samples. "error": refuse the data. "skip": leave them out. "truncate": cut the
            end off; samples whose images or whole answers would be cut are left out. Both are counted in `report`.
        feature_store: gives "vision_features" instead of "pixel_values".

    Raises:
        DataError: one error that lists the first ten problems.
    """

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
        samples, problems = read_sources(sources)
        self._report = {"records": len(samples) + len(problems), "used": 0, "skipped_overlong": 0, "truncated": 0}
        self.samples: list[Sample] = []
        self.lengths: list[int] = []
        """Tokens of each sample, estimated for short ones: good enough to group samples of similar length."""
        for sample in samples:
            try:
                length = self._admit(sample, overlong)
            except DataError as error:
                problems.append(str(error))
                continue
            if length is not None:
                self.samples.append(sample)
                self.lengths.append(length)
        self._report["used"] = len(self.samples)
        self._keys = self._feature_keys(problems)
        raise_problems(problems, self._report["records"])
        if not self.samples:
            raise DataError(
                f"no sample is left of {self._report['records']} record(s) in {[str(path) for path, _ in sources]}; "
                f"{self._report['skipped_overlong']} were longer than max_length {max_length}"
            )

    def _admit(self, sample: Sample, overlong: Overlong) -> int | None:
        """The length of a sample, None if it is left out."""
        try:
            bound = self.processor.max_encoded_length(sample.turns, len(sample.images))
            if bound <= self.max_length:
                num_placeholders = len(sample.images) * self.processor.num_image_tokens
                return num_placeholders + max(1, (bound - num_placeholders) // 4)
            encoded = self.processor.encode_text(sample.turns, len(sample.images))
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
        nothing_left = self.processor.answer_start(sample.turns) >= self.max_length
        if overlong == "skip" or cuts_image or nothing_left:
            self._report["skipped_overlong"] += 1
            return None
        self._report["truncated"] += 1
        return self.max_length

    def _feature_keys(self, problems: list[str]) -> dict[Path, str]:
        if self.feature_store is None:
            return {}
        keys: dict[Path, str] = {}
        for sample in self.samples:
            for path in sample.images:
                if path in keys:
                    continue
                keys[path] = image_key(path)
                if keys[path] not in self.feature_store:
                    problems.append(
                        f"{sample.source}: record {sample.id!r}: image {path} is not in the feature store "
                        f"{self.feature_store.path}; write the store again for this data"
                    )
        return keys

    def report(self) -> dict[str, int]:
        """Counts: records, used, skipped_overlong, truncated."""
        return dict(self._report)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: input_ids (S,), labels (S,), pixel_values (n, 3, H, W) or vision_features (n, N, C), sample_id.

        Raises:
            DataError: an image cannot be decoded; names the record and the file.
        """
        sample = self.samples[index]
        item: dict[str, Any] = {"sample_id": sample.id}
        try:
            encoded: dict[str, torch.Tensor] = self.processor.encode_text(sample.turns, len(sample.images))
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
        if sample.images and self.feature_store is not None:
            item["vision_features"] = self.feature_store.get([self._keys[path] for path in sample.images])
        elif sample.images:
            item["pixel_values"] = self.processor.encode_images([load_image(path, sample.id) for path in sample.images])
        return item
