"""What the tests of vision towers share: tiny towers, what they compute, and open_clip's transformer written anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionModel,
)

from llava_moe.config import ModelSection
from llava_moe.model.assemble import load_model
from tests.model.inputs import logits_of
from tests.tiny_model import tiny_vision_config

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16,
                         "patch_size": 8}  # fmt: skip
SIGLIP_MEAN, DINO_MEAN, DINO_STD = [0.5, 0.5, 0.5], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def tower_of(kind: str, image_size: int = 16, patch_size: int = 8) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "image_size": image_size, "patch_size": patch_size}
    if kind == "dinov2":
        tower: Any = Dinov2Model(Dinov2Config(**sizes))
    elif kind == "registers":
        tower = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=2))
    else:
        config: Any = tiny_vision_config(kind)
        config.image_size, config.patch_size = image_size, patch_size
        tower = (SiglipVisionModel if kind == "siglip" else CLIPVisionModel)(config)
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.2)
    return tower.eval()


def section(parts: Path, tower: str, **changes: Any) -> ModelSection:
    values: dict[str, Any] = {"language_model": str(parts / "llama"), "vision_feature_select_strategy": "full"}
    return ModelSection(vision_tower=tower, **{**values, **changes})


def layer_outputs(tower: Any, pixels: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(tower(pixels, output_hidden_states=True).hidden_states)


def normalised(raw: Tensor) -> Tensor:
    """Pixels as DINOv2 takes them."""
    return (raw - torch.tensor(DINO_MEAN)[:, None, None]) / torch.tensor(DINO_STD)[:, None, None]


def count_calls(layers: Any) -> tuple[list[int], list[Any]]:
    """How often the attention or MLP inside each layer runs; the handles undo the counting."""
    counts = [0] * len(layers)

    def hook(index: int) -> Any:
        def add(*_: Any) -> None:
            counts[index] += 1

        return add

    return counts, [layer.mlp.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]


def check_round_trip(model: Any, folder: Path, size: int) -> None:
    """Saved and loaded, the model gives the same logits; the picture matters."""
    model.save_pretrained(folder, save_original_format=True)
    loaded, num_tokens = load_model(folder), model.config.image_seq_length
    ids = torch.tensor([[1, *[model.config.image_token_id] * num_tokens, 5, 6]])
    pixels = torch.randn(1, 3, size, size)
    expected = logits_of(model, input_ids=ids, pixel_values=pixels)
    assert torch.equal(logits_of(loaded, input_ids=ids, pixel_values=pixels), expected)
    assert not torch.equal(logits_of(loaded, input_ids=ids, pixel_values=-pixels), expected)
    assert type(loaded.model.vision_tower) is type(model.model.vision_tower)


class OpenClipBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor, quick: bool) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else nn.functional.gelu(hidden)
        return x + self.mlp["c_proj"](hidden)


class OpenClip(nn.Module):
    """A vision transformer with open_clip's names, written from its architecture."""

    def __init__(self, width: int = 16, heads: int = 2, layers: int = 3, patch: int = 8, cells: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(cells + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(OpenClipBlock(width, heads) for _ in range(layers))
        self.proj = nn.Parameter(torch.randn(width, 8))

    def forward(self, pixels: Tensor, quick: bool) -> list[Tensor]:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        states = [self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)]
        for block in self.transformer.resblocks:  # type: ignore[union-attr]
            states.append(block(states[-1], quick))
        return states


OPEN_CLIP = {"vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 3, "head_width": 8,
                            "mlp_ratio": 2.0}, "text_cfg": {}, "embed_dim": 8}  # fmt: skip


def write_open_clip(folder: Path, **changes: Any) -> Path:
    file = folder / "open_clip_config.json"
    model = {**OPEN_CLIP, **{key: value for key, value in changes.items() if key == "quick_gelu"}}
    model["vision_cfg"] = {**OPEN_CLIP["vision_cfg"], **{k: v for k, v in changes.items() if k != "quick_gelu"}}  # type: ignore[dict-item]
    file.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {"mean": DINO_MEAN, "std": DINO_STD}}))
    return file
