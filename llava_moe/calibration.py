"""Samples of a data file as batches for the programs that look at a dense model on real data."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from llava_moe.config import CalibrationSection, RecipeError
from llava_moe.data.collator import Collator
from llava_moe.data.dataset import ConversationDataset
from llava_moe.data.processing import load_processor

MAX_LENGTH = 2048
BATCH_TOKENS = 4096  # a model that is read from disk layer by layer should run over few batches


def calibration_batches(section: CalibrationSection, parent: str | Path) -> list[dict[str, Tensor]]:
    """The first `num_samples` usable records of the file, as the parent's own processor renders them.

    Args:
        section: the recipe's.
        parent: a checkpoint directory with its processor.

    Raises:
        DataError: the file or an image is broken.
        RecipeError: the file has fewer usable records than are asked for.
    """
    if section.num_samples < 1:
        raise RecipeError(f"calibration.num_samples={section.num_samples} must be at least 1")
    processor = load_processor(parent)
    dataset = ConversationDataset(
        [(section.path, section.image_folder)], processor, max_length=MAX_LENGTH, overlong="truncate"
    )
    if len(dataset) < section.num_samples:
        raise RecipeError(
            f"calibration.num_samples={section.num_samples}: {section.path} has {len(dataset)} usable records"
        )
    collate = Collator.of(processor)
    batches = []
    for indices in _grouped([len(dataset[i]["input_ids"]) for i in range(section.num_samples)]):
        batch = collate([dataset[i] for i in indices])
        if not (batch["input_ids"] == processor.image_token_id).any():
            # the collator's dummy picture, which only training needs
            batch = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "labels")}
        batches.append(batch)
    return batches


def _grouped(lengths: list[int]) -> list[list[int]]:
    """Indices in their order, in groups that take at most `BATCH_TOKENS` when they are padded."""
    groups: list[list[int]] = []
    longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if not groups or longest * (len(groups[-1]) + 1) > BATCH_TOKENS:
            groups.append([])
            longest = length
        groups[-1].append(index)
    return groups
