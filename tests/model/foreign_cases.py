"""Tiny checkpoints of image-text-to-text classes that are not LLaVA, with inputs for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from llava_moe.config import NamedSection, PartSection, UpcycleSection
from tests.tiny import tiny_tokenizer

TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15, "attention_dropout": 0.0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}


@dataclass(frozen=True)
class Family:
    """A stock class.

    Attributes:
        text, vision, other: values of its config.
        num_image_tokens: of one picture.
        pixels: the shape of one batch of two pictures.
        inputs: further inputs, from the ids and the mask of the image tokens.
        decoder: where the decoder lies.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    other: dict[str, Any]
    num_image_tokens: int
    pixels: tuple[int, ...]
    decoder: str = "model.language_model"

    @property
    def extras(self) -> set[str]:
        return set(self.other.get("_inputs", ()))


_IDEFICS = Family(
    {**TEXT, "model_type": "llama"},
    {**_TOWER, "image_size": 16, "patch_size": 4, "initializer_range": 0.15},
    {"scale_factor": 2},
    4,
    (2, 1, 3, 16, 16),
    "model.text_model",
)
FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        {"depth": 2, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "window_size": 16,
         "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "fullatt_block_indexes": [1],
         "initializer_range": 0.15},
        {},
        4,
        (2 * 16, 3 * 2 * 4 * 4),
    ),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "paligemma": Family(
        {**TEXT, "model_type": "gemma", "head_dim": 8},
        {**_TOWER, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, "vision_use_head": False,
         "projection_dim": 32},
        {"projection_dim": 32, "hidden_size": 32},
        4,
        (2, 3, 16, 16),
    ),
    "internvl": Family(
        {**TEXT, "model_type": "qwen2"},
        {**_TOWER, "model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
        {"downsample_ratio": 0.5, "vision_feature_layer": -1},
        4,
        (2, 3, 16, 16),
    ),
    "gemma3": Family(
        {**TEXT, **_GEMMA, "model_type": "gemma3_text", "sliding_window_pattern": 2},
        {**_TOWER, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, "vision_use_head": False},
        {"mm_tokens_per_image": 4, "boi_token_index": 3, "eoi_token_index": 4},
        4,
        (2, 3, 16, 16),
    ),
    "mistral3": Family(
        {**TEXT, "model_type": "mistral", "head_dim": 8},
        {**_TOWER, "model_type": "pixtral", "image_size": 16, "patch_size": 4, "head_dim": 6},
        {"spatial_merge_size": 2, "vision_feature_layer": -1},
        4,
        (2, 3, 16, 16),
    ),
    "qwen2_vl": Family(
        {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        {"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
         "temporal_patch_size": 2, "mlp_ratio": 2, "initializer_range": 0.15},
        {},
        4,
        (2 * 16, 3 * 2 * 4 * 4),
    ),
}  # fmt: skip
# The four that the README names are tried in every run.
NAMED = ("qwen2_5_vl", "smolvlm", "paligemma", "internvl")
every_family = pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=() if name in NAMED else pytest.mark.slow) for name in FAMILIES]
)


def stock_config(kind: str) -> Any:
    family, tokenizer = FAMILIES[kind], tiny_tokenizer()
    image = int(tokenizer.convert_tokens_to_ids("<image>"))  # type: ignore[arg-type]
    key = "image_token_index" if kind in ("paligemma", "gemma3", "mistral3") else "image_token_id"
    text = {"vocab_size": len(tokenizer), **family.text}
    values = {key: image, "vision_start_token_id": 5, "vision_end_token_id": 6, **family.other}
    return CONFIG_MAPPING[kind](text_config=text, vision_config=family.vision, **values)


def write_stock(folder: Path, kind: str) -> Path:
    """A checkpoint of the stock class, with a tokenizer, as its makers would publish it."""
    config = stock_config(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForImageTextToText.from_config(config)
        for name, parameter in model.named_parameters():
            # small defaults would make pictures, or the whole answer, a matter of rounding
            if parameter.ndim > 1 and "embed" not in name:
                torch.nn.init.normal_(parameter, std=0.15)
        assert type(model).__module__.startswith("transformers.")
        model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def batch_of(kind: str, seed: int = 1, length: int = 14) -> dict[str, Tensor]:
    """Two rows: one word, one picture, words; the second row is padded by two on the right."""
    family, config = FAMILIES[kind], stock_config(kind)
    generator = torch.Generator().manual_seed(seed)
    image = getattr(config, "image_token_id", None) or config.image_token_index
    ids = torch.randint(7, 300, (2, length), generator=generator)
    ids[:, 1 : 1 + family.num_image_tokens] = image
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    found = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(family.pixels, generator=generator)}
    if kind.startswith("qwen2"):
        found["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        found["mm_token_type_ids"] = (ids == image).int()
    if kind in ("paligemma", "gemma3"):
        found["token_type_ids"] = (ids == image).long() if kind == "gemma3" else torch.zeros_like(ids)
    if kind == "mistral3":
        found["image_sizes"] = torch.tensor([[16, 16]] * 2)
    return found


def prompts_of(kind: str) -> dict[str, Tensor]:
    found = batch_of(kind)
    return {**found, "attention_mask": torch.ones_like(found["input_ids"])}


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).logits


def answers(model: Any, kind: str) -> list[list[int]]:
    found = model.generate(**prompts_of(kind), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    return found.tolist()


def section(parent: Path, **changes: Any) -> UpcycleSection:
    values: dict[str, Any] = {"layers": [0, 2], "num_experts": 4, "router": NamedSection("top_k", {"k": 2})}
    return UpcycleSection(parent=str(parent), decoder=PartSection(**{**values, **changes}))
