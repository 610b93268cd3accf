"""The order of the samples: a function of seed and epoch alone.

A resumed run must meet the batches that the interrupted one would have met. The stock samplers draw from a generator
that a new process starts anew, or are told the epoch along a path that several ranks and a skipped start break.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback

from llava_moe.data.sampler import length_grouped_order, modality_grouped_order


class EpochSampler(Sampler[int]):
    """A new permutation in every epoch.

    Args:
        lengths: tokens of each sample.
        seed: of the permutations.
        group_size: samples of one step; with it, samples of similar length come together. 0: a plain shuffle.
        has_image: for each sample; with it, and a group size, no group holds samples of both kinds.
    """

    def __init__(
        self, lengths: Sequence[int], seed: int, group_size: int = 0, has_image: Sequence[bool] | None = None
    ) -> None:
        self.lengths = lengths
        self.seed = seed
        self.group_size = group_size
        self.has_image = has_image
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.group_size and self.has_image is not None:
            return iter(modality_grouped_order(self.lengths, self.has_image, self.group_size, generator))
        if self.group_size:
            return iter(length_grouped_order(self.lengths, self.group_size, generator))
        return iter(torch.randperm(len(self.lengths), generator=generator).tolist())


class EpochCallback(TrainerCallback):  # type: ignore[misc]  # transformers types it as Any
    """Tells the sampler which epoch begins, also after a resume in the middle of one."""

    def __init__(self) -> None:
        self.sampler: EpochSampler | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))
