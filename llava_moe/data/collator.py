"""From samples to the batch that the model's forward takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava_moe.data.broken import KEY, split
from llava_moe.data.conversation import IGNORE_INDEX
from llava_moe.data.processing import LlavaMoeProcessor
from llava_moe.data.schema import DataError
from llava_moe.data.visuals import join_visuals

PADDING = -1
"""The sequence id of padding in a packed batch."""
_TILED_KEYS = ("image_sizes", "num_tiles", "is_video", "image_tokens")


@dataclass(frozen=True)
class Collator:
    """Pads on the right, joins the images of all samples, and always supplies an image.

    A batch without any image gets one image of zeros. Under ZeRO and DDP every rank must run the tower in every step,
    or the ranks wait for each other for ever; the model multiplies the surplus features by zero.

    Args:
        pad_token_id: of the tokenizer.
        image_token_id: the placeholder.
        num_image_tokens: placeholders for each image; unused with tiles, where every sample says its own.
        image_shape: (3, H, W) of processed images or tiles; or
        feature_shape: (N, C) of stored tower features.
        is_tiled: the samples are those of a model with tiles.
    """

    pad_token_id: int
    image_token_id: int
    num_image_tokens: int
    image_shape: tuple[int, int, int] | None = None
    feature_shape: tuple[int, int] | None = None
    is_tiled: bool = False

    def __post_init__(self) -> None:
        if (self.image_shape is None) == (self.feature_shape is None):
            raise DataError("a Collator needs either image_shape or feature_shape, not both")
        if self.is_tiled and self.image_shape is None:
            raise DataError("stored features are those of whole images; a model with tiles needs image_shape")

    @staticmethod
    def of(processor: LlavaMoeProcessor, feature_shape: tuple[int, int] | None = None) -> Collator:
        """The collator that goes with a processor, for pixels or for stored features."""
        return Collator(
            pad_token_id=processor.pad_token_id,
            image_token_id=processor.image_token_id,
            num_image_tokens=processor.num_image_tokens,
            image_shape=processor.image_shape if feature_shape is None else None,
            feature_shape=feature_shape,
            is_tiled=processor.tiling is not None,
        )

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collates items of `ConversationDataset`.

        Returns:
            input_ids, attention_mask, labels (B, S), and pixel_values (n, 3, H, W) or vision_features (n, N, C); n is
            at least 1. With tiles also what `llava_moe.data.visuals` lists, as Python numbers.

        Samples that broke when they were read (`data/broken.py`) are left out; their messages are under "broken". If
        none is left, the batch is that of `nothing`.

        Raises:
            DataError: a sample's placeholders do not match its images; names the sample.
        """
        whole, broken = split(samples)
        batch = self._batch(whole) if whole else self.nothing()
        return {**batch, KEY: broken} if broken else batch

    def nothing(self) -> dict[str, Any]:
        """A batch of padding alone, for a step in which this rank has no sample: it keeps pace and adds no loss.

        It has the form of a packed batch, whose padding no balance loss counts while attention sees an ordinary row; a
        row that is masked from end to end gives NaN in some kernels.
        """
        ids = torch.full((1, 2), self.pad_token_id, dtype=torch.long)
        return {
            "input_ids": ids,
            "labels": torch.full_like(ids, IGNORE_INDEX),
            "position_ids": torch.arange(2).unsqueeze(0),
            "sequence_ids": torch.full_like(ids, PADDING),
            **self._dummy(1),
        }

    def _batch(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        for sample in samples:
            self._check(sample)
        ids = [sample["input_ids"] for sample in samples]
        # from the lengths, not from the padding id: some tokenizers pad with a token that also occurs in text
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0)
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": mask,
            "labels": pad_sequence(
                [sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORE_INDEX
            ),
            **(self._joined(samples) or self._dummy(len(samples))),
        }

    def _joined(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.feature_shape is None:
            return join_visuals(samples)
        stored = [sample["vision_features"] for sample in samples if sample.get("vision_features") is not None]
        return {"vision_features": torch.cat(stored)} if stored else {}

    def _dummy(self, num_samples: int) -> dict[str, Any]:
        key, shape = self._vision
        dummy: dict[str, Any] = {key: torch.zeros(1, *shape)}
        if self.is_tiled:
            size = (shape[1], shape[2])
            dummy |= {"image_sizes": [size], "num_tiles": [1], "batch_num_images": [0] * num_samples}
        return dummy

    @property
    def _vision(self) -> tuple[str, tuple[int, ...]]:
        if self.image_shape is not None:
            return "pixel_values", self.image_shape
        assert self.feature_shape is not None
        return "vision_features", self.feature_shape

    def _check(self, sample: dict[str, Any]) -> None:
        key, shape = self._vision
        images = sample.get(key)
        images = torch.zeros(0, *shape) if images is None else images
        where = f"sample {sample['sample_id']!r}"
        if tuple(images.shape[1:]) != shape:
            raise DataError(
                f"{where}: {key} of shape {tuple(images.shape)}, expected (n, {', '.join(map(str, shape))})"
            )
        if len(sample["input_ids"]) != len(sample["labels"]):
            raise DataError(f"{where}: {len(sample['input_ids'])} ids but {len(sample['labels'])} labels")
        found = int((sample["input_ids"] == self.image_token_id).sum())
        if self.is_tiled:
            self._check_tiles(sample, len(images), found, where)
        elif found != len(images) * self.num_image_tokens:
            raise DataError(
                f"{where}: {found} image placeholders for {len(images)} image(s) of {self.num_image_tokens} tokens in "
                f"{key!r}; was it made by this model's processor and not cut by max_length?"
            )

    def _check_tiles(self, sample: dict[str, Any], num_pictures: int, found: int, where: str) -> None:
        absent = [key for key in _TILED_KEYS if num_pictures and key not in sample]
        if absent:
            raise DataError(f"{where}: has no {absent[0]!r}; was it made by the processor of a model with tiles?")
        tiles, tokens = sample.get("num_tiles", []), sample.get("image_tokens", [])
        if sum(tiles) != num_pictures or len({len(sample.get(key, [])) for key in _TILED_KEYS}) != 1:
            raise DataError(f"{where}: {num_pictures} pictures, but its images have {tiles} tiles")
        if found != sum(tokens):
            raise DataError(
                f"{where}: {found} image placeholders, but its images become {tokens} tokens; was it made by this "
                "model's processor and not cut by max_length?"
            )
