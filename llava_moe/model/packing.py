"""What the model must know of rows that hold several samples, and a test of whether a model keeps them apart.

A packed batch has `sequence_ids` (B, S), the number of each token's sample in its row and -1 for padding, and
`position_ids` that start again with each sample; it has no attention mask (see data/packing.py).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_LENGTHS = (7, 3, 9, 5)


def packed_layout(sequence_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and sequence numbers for the routing context.

    Args:
        sequence_ids: int64 (B, S); neighbours with the same id in a row belong together.

    Returns:
        bool (B, S), False for padding; and int64 (B, S), a number for each sample of the batch, counted from 0 in the
        order of the rows. A stretch of padding has a number of its own, so that all numbers are below B * S.
    """
    first = torch.ones_like(sequence_ids, dtype=torch.bool)
    first[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    number = first.reshape(-1).cumsum(0) - 1
    return sequence_ids >= 0, number.reshape(sequence_ids.shape)


def packed_inputs(sequence_ids: Tensor, attention_mask: Tensor | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """The other inputs of a packed forward, without a cache; refuses what would mix the samples.

    transformers looks for boundaries in the positions only where there is neither a mask nor a cache, and says nothing
    where it does not.

    Raises:
        ValueError: there is an attention mask, a cache is asked for, or there are no positions of the same shape.
    """
    if attention_mask is not None:
        raise ValueError("a packed batch (sequence_ids) must have no attention_mask, or its samples see each other")
    if inputs.get("use_cache") or inputs.get("past_key_values") is not None:
        raise ValueError("a packed batch (sequence_ids) cannot use a cache: its samples would see each other")
    position_ids = inputs.get("position_ids")
    if position_ids is None or position_ids.shape != sequence_ids.shape:
        found = None if position_ids is None else tuple(position_ids.shape)
        raise ValueError(
            f"a packed batch needs position_ids of the shape of sequence_ids {tuple(sequence_ids.shape)}, which start "
            f"again with each sample; found {found}"
        )
    return {**inputs, "use_cache": False}


@torch.no_grad()
def check_packing(model: Any, *, flat: bool = False, varlen: bool = False, tolerance: float | None = None) -> float:
    """Compares four short random texts in one batch with the same texts packed; to be called before training.

    Attention is not the only thing that could join samples: a recurrent block has a state, and a mixing layer looks at
    the whole row. What this model does is therefore measured, on its own device and in its own precision.

    Args:
        model: of `MoeMixin`.
        flat, varlen: as the collator is set, see `data.packing.PackingCollator`.
        tolerance: relative; by default 1e-3 in float32 and 0.05 in lower precision, where what mixes differs by 0.5.

    Returns:
        The median over tokens of the relative difference of the logits.

    Raises:
        ValueError: the samples are not kept apart.
    """
    device = model.get_input_embeddings().weight.device
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    usable = torch.tensor([i for i in range(min(config.vocab_size, 1000)) if i != model.config.image_token_id])
    texts = [usable[torch.randint(len(usable), (n,), generator=generator)] for n in _LENGTHS]
    alone, packed = _unpacked(texts), _packed(texts, flat, varlen)
    was_training = model.training
    model.eval()
    try:
        separate, together = (
            model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}, use_cache=False).logits
            for batch in (alone, packed)
        )
    finally:
        model.train(was_training)
    wanted = torch.cat([separate[row, :length] for row, length in enumerate(_LENGTHS)]).float()
    sequence = packed["sequence_ids"].to(device)
    found, place = together[sequence >= 0].float(), sequence[sequence >= 0]
    # The first sample of a row has nothing in front of it and proves nothing.
    wanted, found = wanted[place > 0], found[place > 0]
    difference = float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-6)).median())
    limit = tolerance if tolerance is not None else 1e-3 if separate.dtype == torch.float32 else 0.05
    if not difference <= limit:
        raise ValueError(
            f"this model does not keep packed samples apart under {config._attn_implementation} attention: their "
            f"outputs differ by {difference:.3g} (at most {limit:g} allowed); turn packing off"
        )
    return difference


def _unpacked(texts: list[Tensor]) -> dict[str, Any]:
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


def _packed(texts: list[Tensor], flat: bool, varlen: bool) -> dict[str, Any]:
    """All texts in one row, or two in each of two rows, the shorter of them padded."""
    groups = [texts] if flat else [texts[:2], texts[2:]]
    width = max(sum(map(len, group)) for group in groups)
    ids = torch.zeros(len(groups), width, dtype=torch.int64)
    sequence, position, bounds = torch.full_like(ids, -1), torch.zeros_like(ids), [0]
    for row, group in enumerate(groups):
        start = 0
        for number, text in enumerate([*group, ids.new_zeros(width - sum(map(len, group)))]):
            end = start + len(text)
            position[row, start:end] = torch.arange(len(text))
            if number < len(group):
                ids[row, start:end], sequence[row, start:end] = text, number
            if len(text):
                bounds.append(bounds[-1] + len(text))
            start = end
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": position, "sequence_ids": sequence}
    if varlen:
        bound, longest = torch.tensor(bounds, dtype=torch.int32), max(b - a for a, b in pairwise(bounds))
        batch |= {"cu_seq_lens_q": bound, "cu_seq_lens_k": bound, "max_length_q": longest, "max_length_k": longest}
    return batch
