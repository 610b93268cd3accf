"""Inputs and comparisons for tiny models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.tiny_model import IMAGE_TOKENS

NUM_WORDS = 400  # ids below are plain text


def picture_batch(model: Any, batch: int = 2, length: int = 12, seed: int = 3) -> dict[str, Tensor]:
    """`batch` rows of a picture behind one token and random text, right-padded by one token per row, with labels."""
    generator = torch.Generator().manual_seed(seed)
    side = model.config.vision_config.image_size
    ids = torch.randint(0, NUM_WORDS, (batch, length), generator=generator)
    ids[:, 1 : 1 + IMAGE_TOKENS] = model.config.image_token_id
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - row :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : length - 5] = -100
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def prompt_batch(model: Any, batch: int = 2, length: int = 12, seed: int = 3) -> dict[str, Tensor]:
    """Rows of one length without padding or labels, for generation."""
    found = picture_batch(model, batch, length, seed)
    return {"input_ids": found["input_ids"], "pixel_values": found["pixel_values"]} | {
        "attention_mask": torch.ones_like(found["input_ids"])
    }


@torch.no_grad()
def logits_of(model: Any, **inputs: Tensor) -> Tensor:
    inputs.pop("labels", None)
    return model(**inputs).logits


def greedy(model: Any, num_tokens: int = 8, **inputs: Tensor) -> list[list[int]]:
    """Answers, without the prompt; the end token is ignored so that the length is always the same."""
    found = model.generate(**inputs, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
    return found[:, inputs["input_ids"].shape[1] :].tolist()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
