"""From samples to the batch that the model's forward takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llava_moe.data.conversation import IGNORE_INDEX
from llava_moe.data.schema import DataError


@dataclass(frozen=True)
class Collator:
    """Pads on the right, joins the images of all samples, and always supplies an image.

    A batch without any image gets one image of zeros. Under ZeRO and DDP every rank must run the tower in every step,
    or the ranks wait for each other for ever; the model multiplies the surplus features by zero.

    Args:
        pad_token_id: of the tokenizer.
        image_token_id: the placeholder.
        num_image_tokens: placeholders for each image.
        image_shape: (3, H, W) of processed images; or
        feature_shape: (N, C) of stored tower features.
    """

    pad_token_id: int
    image_token_id: int
    num_image_tokens: int
    image_shape: tuple[int, int, int] | None = None
    feature_shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.image_shape is None) == (self.feature_shape is None):
            raise DataError("a Collator needs either image_shape or feature_shape, not both")

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collates items of `ConversationDataset`.

        Returns:
            input_ids, attention_mask, labels (B, S), and pixel_values (n, 3, H, W) or vision_features (n, N, C);
            n is at least 1.

        Raises:
            DataError: a sample's placeholders do not match its images; names the sample.
        """
        key, shape = self._vision
        images = [self._checked_images(sample, key, shape) for sample in samples]
        joined = torch.cat(images)
        ids = [sample["input_ids"] for sample in samples]
        # from the lengths, not from the padding id: some tokenizers pad with a token that also occurs in text
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0)
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": mask,
            "labels": pad_sequence(
                [sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORE_INDEX
            ),
            key: joined if len(joined) else torch.zeros(1, *shape),
        }

    @property
    def _vision(self) -> tuple[str, tuple[int, ...]]:
        if self.image_shape is not None:
            return "pixel_values", self.image_shape
        assert self.feature_shape is not None
        return "vision_features", self.feature_shape

    def _checked_images(self, sample: dict[str, Any], key: str, shape: tuple[int, ...]) -> torch.Tensor:
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
        if found != len(images) * self.num_image_tokens:
            raise DataError(
                f"{where}: {found} image placeholders for {len(images)} image(s) of {self.num_image_tokens} tokens in "
                f"{key!r}; was it made by this model's processor and not cut by max_length?"
            )
        return images
