"""What the tests of projectors share: one case for each.

Towers are a grid of 4 x 4 features of 24 channels (32 for the identity), decoders 32 wide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.tiny_model import tiny_model, tiny_vision_config

SIDE, CHANNELS, HIDDEN = 4, 24, 32
FEATURES = SIDE * SIDE
# options, and the tokens that 16 features become
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({}, 16),
    "identity": ({}, 16),
    "mlp2x_gelu": ({}, 16),
    "mlp3x_gelu": ({}, 16),
    "mlp4x_gelu": ({}, 16),
    "pixel_shuffle": ({"factor": 2}, 4),
    "average_pool": ({"factor": 4}, 1),
    "perceiver": ({"num_latents": 5, "depth": 2, "num_heads": 2, "head_width": 4}, 5),
    "c_abstractor": ({"num_tokens": 9, "depth": 2, "width": 16, "group_size": 4}, 9),
    "ldp": ({}, 4),
    "ldp_v2": ({}, 4),
}
ALL = sorted(CASES)


def vision_config(name: str) -> Any:
    config: Any = tiny_vision_config("siglip")
    config.image_size = 8 * SIDE
    config.hidden_size = HIDDEN if name == "identity" else CHANNELS
    return config


def model_with(name: str, options: dict[str, Any] | None = None) -> Any:
    args, _ = CASES[name]
    return tiny_model(
        projector=name, projector_args=args if options is None else options, vision_config=vision_config(name)
    )


def projector_of(name: str, options: dict[str, Any] | None = None) -> Any:
    return model_with(name, options).model.multi_modal_projector


def features_for(name: str, batch: int = 2) -> Tensor:
    return torch.randn(batch, FEATURES, HIDDEN if name == "identity" else CHANNELS)


def batch_for(model: Any, num_tokens: int, batch: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(0, 400, (batch, num_tokens + 6))
    ids[:, 1 : 1 + num_tokens] = model.config.image_token_id
    labels = ids.clone()
    labels[:, : 1 + num_tokens] = -100
    size = model.config.vision_config.image_size
    pixels = torch.randn(batch, 3, size, size)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
