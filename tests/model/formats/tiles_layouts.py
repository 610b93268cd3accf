"""Tiny checkpoints of models with tiles, and what they compute for one picture, evaluated from the reference rules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from tests.model.formats.layouts import bare, decoder, llava_config, prefixed, projector, seeded, tower_folder, write
from tests.reference.anyres import sequence, tile_counts
from tests.tiny import tiny_llama_tokenizer
from tests.tiny_model import HIDDEN, tiny_text_config, tiny_vision_config

TILE = 16
GRIDS = [[48, 16], [16, 32]]  # (height, width); read the other way round, they give another number of tiles
SIZE = (37, 23)  # (height, width) of the picture


def newline() -> Tensor:
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(8))


def original(folder: Path, kind: str, **changes: Any) -> tuple[Path, Any, Any, Any]:
    """LLaVA's own layout: (directory, decoder, tower, projector). kind: clip, or siglip with its last layer cut off."""
    tower_dir, tower = tower_folder(folder / "tower", kind)
    model, project = decoder("qwen2" if kind == "siglip" else "llama"), projector()
    tensors = dict(model.state_dict()) | prefixed("model.mm_projector.", project.state_dict())
    tensors["model.image_newline"] = newline()
    if kind == "siglip":
        kept = {bare(name): value for name, value in tower.state_dict().items() if ".layers.2." not in name}
        tensors |= prefixed("model.vision_tower.vision_tower.vision_model.", kept)
    given = {"mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[w, h] for h, w in GRIDS], **changes}
    raw = llava_config(model, tower_dir, "llava", **given)
    return write(folder / "source", raw, tensors, tiny_llama_tokenizer()), model, tower, project


def stock(folder: Path, kind: str) -> tuple[Path, Any]:
    """transformers' own: (directory, model). kind: llava_next or llava_onevision."""
    tokenizer = tiny_llama_tokenizer()
    token, onevision = tokenizer.convert_tokens_to_ids("<image>"), kind == "llava_onevision"
    values: dict[str, Any] = {
        "vision_config": tiny_vision_config("siglip" if onevision else "clip"),
        "text_config": tiny_text_config("qwen2" if onevision else "llama", len(tokenizer)),
        "image_token_index": token,
        "image_grid_pinpoints": GRIDS,
        "vision_feature_layer": -1 if onevision else -2,
        "vision_feature_select_strategy": "full" if onevision else "default",
    }
    size = {"height": TILE, "width": TILE}
    if onevision:
        config: Any = LlavaOnevisionConfig(**values, video_token_index=token, vision_aspect_ratio="anyres_max_1")
        model = seeded(lambda: LlavaOnevisionForConditionalGeneration(config), 11)
        processor: Any = LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=GRIDS),
            tokenizer=tokenizer,
            video_processor=LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=4,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_1",
        )
    else:
        config = LlavaNextConfig(**values, image_seq_length=4)
        model = seeded(lambda: LlavaNextForConditionalGeneration(config), 11)
        processor = LlavaNextProcessor(
            image_processor=LlavaNextImageProcessorPil(size=size, crop_size=size, image_grid_pinpoints=GRIDS),
            tokenizer=tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder / "source")
    processor.save_pretrained(folder / "source")
    return folder / "source", model


def tiles() -> tuple[Tensor, tuple[int, int]]:
    """Random tiles (T, 3, 16, 16) of a picture of `SIZE`, the whole first, and their rows and columns."""
    counts = tile_counts(SIZE, [(height, width) for height, width in GRIDS], TILE)
    generator = torch.Generator().manual_seed(5)
    return torch.randn(1 + counts[0] * counts[1], 3, TILE, TILE, generator=generator), counts


@torch.no_grad()
def by_hand(
    model: Any,
    features: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor],
    ids: Tensor,
    at: int,
    **rules: Any,
) -> Tensor:
    """Logits of text around one picture of `tiles()`, its sequence from tests/reference/anyres.py.

    Args:
        ids: (1, S) without placeholders.
        rules: of `sequence`.
    """
    pictures, counts = tiles()
    found = np.stack([project(features(tile[None]))[0].double().numpy() for tile in pictures])
    merged = torch.tensor(sequence(found, SIZE, counts, **rules), dtype=torch.float32)[None]
    words = model.get_input_embeddings()(ids)
    return model(inputs_embeds=torch.cat([words[:, :at], merged, words[:, at:]], dim=1)).logits
