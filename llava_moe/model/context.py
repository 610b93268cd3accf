"""What the MoE layers of a decoder are told about the tokens of a forward. Shapes: B rows, S positions, T = B x S."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_moe.model.packing import packed_layout
from llava_moe.moe import RoutingContext


def routing_context(
    input_ids: Tensor | None,
    embeds: Tensor | None,
    attention_mask: Any,
    image_token: int | None,
    training: bool,
    sequence_ids: Tensor | None = None,
) -> RoutingContext:
    """Which tokens are padding and which stand for a picture.

    Args:
        input_ids, embeds: (B, S) and (B, S, D), of which one is given.
        attention_mask: (B, S), or with a cache (B, past + S); other kinds of transformers say nothing of padding.
        image_token: the placeholder's id, None where there is none.
        training: whether balance losses may be computed.
        sequence_ids: (B, S) of a packed batch, the sample of each token in its row and -1 for padding.

    Raises:
        ValueError: neither ids nor embeddings are given; or in training there is no mask of two dimensions, and balance
            losses would count the padding.
    """
    given = input_ids if input_ids is not None else embeds
    if given is None:
        raise ValueError("give input_ids or inputs_embeds")
    batch, length = given.shape[:2]
    rows = torch.arange(batch, device=given.device).unsqueeze(-1).expand(batch, length)
    if sequence_ids is not None:
        mask, rows = packed_layout(sequence_ids)
    elif isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        # With a cache the mask covers the past too; the tokens at hand are its last columns.
        mask = attention_mask[:, -length:].bool()
    elif attention_mask is None or not training:
        mask = torch.ones(batch, length, dtype=torch.bool, device=given.device)
    else:
        raise ValueError("training a MoE model needs a 2-D attention_mask: balance losses must know the padding")
    pictures = None if input_ids is None or image_token is None else input_ids.eq(image_token).reshape(-1).long()
    return RoutingContext(
        token_mask_T=mask.reshape(-1),
        sequence_T=rows.reshape(-1),
        modality_T=pictures,
        token_ids_T=None if input_ids is None else input_ids.reshape(-1),
    )
