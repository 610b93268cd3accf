"""Packing: several samples in one row, so that hardly any token of a step is padding.

Samples in a row never see one another. Their positions start again at 0, and transformers builds from such positions,
where no attention mask is given, a mask in which a token attends its own sample alone (eager, SDPA) or, for a single
row, the boundaries for FlashAttention's kernel for sequences of different lengths. `sequence_ids` say the same to the
MoE layers, so that balance losses and routers that look at a sequence see the samples as they were. Padding, where rows
differ in length, is a sequence of its own that nothing counts.

The loss of a pack is that of the samples one by one: the first token of a sample is no target, as it is none when the
sample comes alone, and the sum is divided by the same number of targets. What packing does change is the number of
samples in a step: choose the batch size in tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava_moe.data.broken import KEY, split
from llava_moe.data.collator import PADDING, Collator
from llava_moe.data.conversation import IGNORE_INDEX
from llava_moe.data.schema import DataError


@dataclass(frozen=True)
class PackPlan:
    """Which samples share a row.

    Attributes:
        packs: sample numbers; every sample is in exactly one pack.
        lengths: tokens of each pack.
        capacity: tokens that fit into one.
    """

    packs: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    capacity: int

    @property
    def share(self) -> float:
        """Real tokens over all places of all packs."""
        return sum(self.lengths) / max(1, len(self.packs) * self.capacity)


def plan_packs(lengths: Sequence[int] | np.ndarray, capacity: int, seed: int = 0) -> PackPlan:
    """Best fit, longest first: each sample goes where it leaves the least room. Equal lengths come in random order.

    Args:
        lengths: exact tokens of each sample.
        capacity: tokens of a row.
        seed: of the order among equals and within a pack.

    Raises:
        DataError: a sample is empty or longer than a row.
    """
    generator = np.random.default_rng(seed)
    length_N = np.asarray(lengths, dtype=np.int64)
    bad = np.flatnonzero((length_N < 1) | (length_N > capacity))
    if len(bad):
        raise DataError(
            f"sample {bad[0]} has {length_N[bad[0]]} tokens, which fit no row of {capacity}; rows are as long as "
            "data.max_length"
        )
    shuffled = generator.permutation(len(length_N))
    order = shuffled[np.argsort(-length_N[shuffled], kind="stable")]
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room: packs that have just so much
    rooms: list[int] = []  # its keys, sorted
    for sample in order.tolist():
        need = int(length_N[sample])
        place = bisect_left(rooms, need)
        if place == len(rooms):
            pack, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[place]
            pack = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        packs[pack].append(sample)
        if room > need:
            if room - need not in with_room:
                insort(rooms, room - need)
            with_room.setdefault(room - need, []).append(pack)
    mixed = tuple(tuple(int(sample) for sample in generator.permutation(pack)) for pack in packs)
    return PackPlan(mixed, tuple(int(length_N[list(pack)].sum()) for pack in mixed), capacity)


class Samples(Protocol):
    """A map-style data set of single samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def report(self) -> dict[str, Any]: ...


class PackedDataset(Dataset[list[dict[str, Any]]]):
    """Packs in the place of samples: the items of all samples of a pack, as a list.

    What is in a pack is settled here, once; only the order of the packs changes from epoch to epoch. So the number of
    steps is known, and a run that goes on after an interruption meets the packs it would have met.

    Args:
        samples: a data set whose items have `input_ids`.
        lengths: exact tokens of each sample.
        capacity: tokens of a row.
        seed: see `plan_packs`.

    Raises:
        DataError: the lengths are not those of the samples, or one does not fit.
    """

    def __init__(self, samples: Samples, lengths: Sequence[int] | np.ndarray, capacity: int, seed: int = 0) -> None:
        if len(lengths) != len(samples):
            raise DataError(f"{len(lengths)} lengths for {len(samples)} samples")
        self.samples = samples
        self.plan = plan_packs(lengths, capacity, seed)
        self.lengths = list(self.plan.lengths)

    def __len__(self) -> int:
        return len(self.plan.packs)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        """The items of a pack; one that broke when it was read stands there as `data/broken.py` says.

        Raises:
            DataError: the items are longer than was planned with (of a video file the length is a bound).
        """
        items = [self.samples[sample] for sample in self.plan.packs[index]]
        found = sum(len(item["input_ids"]) for item in split(items)[0])
        if found > self.plan.lengths[index]:
            names = ", ".join(repr(item["sample_id"]) for item in split(items)[0])
            raise DataError(
                f"the samples {names} have {found} tokens, but were packed as {self.plan.lengths[index]}; their "
                "lengths were measured with another processor"
            )
        return items

    def report(self) -> dict[str, Any]:
        """That of the samples, with `packs` and `pack_fill`, real tokens over the places of all packs.

        The useful share of a step is at least about that: rows are padded to the longest of their batch, no further.
        """
        return {**self.samples.report(), "packs": len(self), "pack_fill": round(self.plan.share, 4)}


@dataclass(frozen=True)
class PackingCollator:
    """Makes the model's batch of packs.

    Args:
        collator: for single samples; it checks each one and joins what the tower sees.
        pad_token_id: of the tokenizer.
        flat: all packs of a batch in a single row, without any padding. FlashAttention needs it, as transformers finds
            boundaries in one row only; under SDPA the mask of one long row would be as large as its length squared.
        varlen: adds the boundaries for FlashAttention's kernel, which would otherwise be derived in every layer, each
            time waiting for the device.
    """

    collator: Collator
    pad_token_id: int
    flat: bool = False
    varlen: bool = False

    @staticmethod
    def for_attention(collator: Collator, pad_token_id: int, attn_implementation: str) -> PackingCollator:
        """The one that goes with an attention implementation of transformers."""
        flash = "flash" in attn_implementation
        return PackingCollator(collator, pad_token_id, flat=flash, varlen=flash)

    def __call__(self, packs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
        """Collates items of `PackedDataset`.

        Returns:
            input_ids, labels, position_ids, sequence_ids (B, S), B = 1 if flat; what the collator made of the images;
            with `varlen` cu_seq_lens_q, cu_seq_lens_k (N + 1,) int32 and max_length_q, max_length_k. There is no
            attention_mask: with one, transformers would let the samples of a row see each other.

        Samples that broke when they were read are left out of their pack, and a pack of which nothing is left out of
        the batch; see `Collator`.
        """
        whole, broken = split([item for pack in packs for item in pack])
        left = [pack for pack in (split(pack)[0] for pack in packs) if pack]
        batch = self._batch([whole] if self.flat else left, whole) if whole else self.collator.nothing()
        if self.varlen:
            batch |= _boundaries(batch["position_ids"])
        return {**batch, KEY: broken} if broken else batch

    def _batch(self, packs: Sequence[Sequence[dict[str, Any]]], items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.collator(items))
        for key in ("input_ids", "attention_mask", "labels"):
            del batch[key]
        rows = [_row(pack) for pack in packs]
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, "sequence_ids": PADDING, "position_ids": 0}
        for key, value in fill.items():
            batch[key] = pad_sequence([row[key] for row in rows], batch_first=True, padding_value=value)
        width = batch["input_ids"].shape[1]
        for row, made in enumerate(rows):
            length = len(made["input_ids"])
            # counted on from 0, so that padding is one sequence of its own
            batch["position_ids"][row, length:] = torch.arange(width - length)
        return batch


def _row(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The samples of one row, one behind the other."""
    labels = [item["labels"].clone() for item in items]
    for label in labels:
        label[0] = IGNORE_INDEX  # the token before it belongs to another sample
    lengths = [len(item["input_ids"]) for item in items]
    return {
        "input_ids": torch.cat([item["input_ids"] for item in items]),
        "labels": torch.cat(labels),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "sequence_ids": torch.repeat_interleave(torch.arange(len(items)), torch.tensor(lengths)),
    }


def _boundaries(position_ids: Tensor) -> dict[str, Any]:
    """Where the sequences of all rows, laid end to end, begin and end."""
    starts = torch.nonzero(position_ids.reshape(-1) == 0).reshape(-1)
    bounds = torch.cat([starts, torch.tensor([position_ids.numel()])]).to(torch.int32)
    longest = int((bounds[1:] - bounds[:-1]).max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def useful_share(batch: Mapping[str, Any]) -> Tensor:
    """Real tokens over all places of a batch, packed or not: a scalar on the batch's device."""
    if "sequence_ids" in batch:
        return (batch["sequence_ids"] != PADDING).float().mean()
    return batch["attention_mask"].float().mean()
