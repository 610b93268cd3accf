"""Tiny seeded models and checkpoint directories for tests; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

import torch  # isort: skip
from transformers import CLIPVisionConfig, CONFIG_MAPPING, PretrainedConfig, SiglipVisionConfig  # isort: skip

from llava_moe.data.processing import LlavaMoeProcessor  # isort: skip
from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.modeling import LlavaMoeForConditionalGeneration
from llava_moe.model.projectors import Projector
from llava_moe.model.vision import TimmTowerConfig
from llava_moe.moe import Experts, Router
from tests.tiny import tiny_siglip_processor, tiny_tokenizer

HIDDEN, INTERMEDIATE, NUM_LAYERS = 32, 48, 4
IMAGE_TOKENS = 4  # of every tiny tower: a grid of 2 x 2
TINY_PART: dict[str, Any] = {
    "layers": [0, 2],
    "num_experts": 4,
    "router": {"name": "top_k", "args": {"k": 2}},
    "experts": {"name": "stacked", "args": {"kernel": "grouped"}},
}
TINY_MOE: dict[str, Any] = {"decoder": TINY_PART}
# image side, patch side, feature layer, feature selection, tokens beyond the grid
_TOWERS = {"siglip": (16, 8, -2, "full", 0), "clip": (16, 8, -2, "default", 1), "timm": (64, 32, -1, "full", 0)}
_TIMM_ARCHITECTURE = "test_efficientnet"
_FAMILY_ARGS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "mistral": {"head_dim": 8},
    "nemotron": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "phi3": {"original_max_position_embeddings": 256},
}


def tiny_moe(**changes: Any) -> dict[str, Any]:
    """`TINY_MOE` with other keys in the decoder, e.g. `tiny_moe(layers=[1], num_experts=3)`."""
    return {"decoder": {**TINY_PART, **changes}}


def tiny_text_config(text: str = "llama", vocab_size: int | None = None) -> PretrainedConfig:
    """A decoder config of any transformers family, by its model_type. Weights are large enough to differ in answers."""
    tokenizer = tiny_tokenizer()
    config = CONFIG_MAPPING[text](
        vocab_size=len(tokenizer) if vocab_size is None else vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2 if text != "gpt_neox" else 4,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attention_dropout=0.0,
        **_FAMILY_ARGS.get(text, {}),
    )
    return config


def tiny_vision_config(vision: str = "siglip") -> PretrainedConfig:
    """siglip (hidden states, no CLS), clip (CLS first) or timm (a small CNN with batch norm)."""
    image_size, patch_size, *_ = _TOWERS[vision]
    if vision == "timm":
        return TimmTowerConfig(
            architecture=_TIMM_ARCHITECTURE, image_size=image_size, patch_size=patch_size, hidden_size=256
        )
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    return SiglipVisionConfig(**sizes, vision_use_head=False) if vision == "siglip" else CLIPVisionConfig(**sizes)


def tiny_config(
    moe: dict[str, Any] | None = None, text: str = "llama", vision: str = "siglip", **changes: Any
) -> LlavaMoeConfig:
    """The config of a tiny model that fits `tiny_siglip_processor`'s tokenizer.

    Args:
        moe: the section of config.json, for example `TINY_MOE`; None makes a dense model.
        text: a transformers model_type (llama, qwen2, gpt_neox, ...).
        vision: siglip, clip or timm.
        changes: other values of `LlavaMoeConfig`.
    """
    _, _, layer, strategy, _ = _TOWERS[vision]
    values: dict[str, Any] = {
        "vision_config": tiny_vision_config(vision),
        "text_config": tiny_text_config(text),
        "image_token_index": tiny_tokenizer().convert_tokens_to_ids("<image>"),
        "image_seq_length": IMAGE_TOKENS,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": False,
        "moe": moe,
    }
    return LlavaMoeConfig(**{**values, **changes})


def tiny_model(
    moe: dict[str, Any] | None = None, text: str = "llama", vision: str = "siglip", seed: int = 0, **changes: Any
) -> LlavaMoeForConditionalGeneration:
    """A seeded float32 model in eval mode; the global random state is left alone."""
    config = tiny_config(moe, text, vision, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaMoeForConditionalGeneration(config).eval()
        # the default initial values are so small that neither pictures nor routing would matter to the answers
        for module in model.modules():
            if isinstance(module, Projector | Experts | Router):
                for parameter in module.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
    return model


def tiny_processor(vision: str = "siglip", template: str = "chatml", image_mode: str = "square") -> LlavaMoeProcessor:
    """The processor that goes with `tiny_model(vision=vision)`."""
    image_size, patch_size, _, strategy, extra = _TOWERS[vision]
    processor = tiny_siglip_processor(template, image_mode, image_size, patch_size)
    processor.vision_feature_select_strategy = strategy
    processor.num_additional_image_tokens = extra
    return processor


def write_tiny_checkpoint(
    path: Path,
    moe: dict[str, Any] | None = None,
    template: str = "chatml",
    text: str = "llama",
    vision: str = "siglip",
    seed: int = 0,
) -> Path:
    """Writes model and processor as a finished run does (names on disk as in stock files); returns `path`."""
    model, processor = tiny_model(moe, text, vision, seed), tiny_processor(vision, template)
    if processor.num_image_tokens != IMAGE_TOKENS:
        raise AssertionError(f"tower {vision}: {processor.num_image_tokens} tokens per image, not {IMAGE_TOKENS}")
    model.generation_config.eos_token_id = processor.stop_token_ids
    model.generation_config.pad_token_id = processor.pad_token_id
    model.save_pretrained(path, save_original_format=True)
    processor.save_pretrained(path)
    return path
