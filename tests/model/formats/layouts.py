"""Tiny checkpoints in the layouts of other programs, made of the tensors of stock transformers models.

The reference is always evaluated by hand from the stock parts (`reference_logits`), never by code of the importers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llava_moe  # noqa: F401  before anything that may import torchvision

import torch  # isort: skip
from safetensors.torch import save_file  # isort: skip
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)

from tests.tiny import tiny_llama_tokenizer
from tests.tiny_model import HIDDEN, tiny_text_config, tiny_vision_config

ROWS = len(tiny_llama_tokenizer()) - 1  # so that a row must be added for the last token
Tensors = dict[str, Tensor]


def seeded(make: Callable[[], Any], seed: int = 1) -> Any:
    """Builds a model from a seed of its own, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
    return model


def tower_folder(folder: Path, kind: str = "clip") -> tuple[Path, Any]:
    """A tower's own directory with its image processor, and the model."""
    config = tiny_vision_config(kind)
    tower = seeded(lambda: (CLIPVisionModel if kind == "clip" else SiglipVisionModel)(config), seed=2)
    size = {"height": 16, "width": 16}
    if kind == "clip":
        CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(folder)
    else:
        SiglipImageProcessorPil(size=size).save_pretrained(folder)
    config.save_pretrained(folder)
    state = {f"vision_model.{bare(name)}": value.contiguous() for name, value in tower.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, tower


def bare(name: str) -> str:
    return name.removeprefix("vision_model.")


def decoder(family: str = "llama", rows: int = ROWS) -> Any:
    """A stock causal language model."""
    return seeded(lambda: AutoModelForCausalLM.from_config(tiny_text_config(family, rows)), seed=3)


def projector() -> nn.Sequential:
    """LLaVA-1.5's projector."""
    return seeded(lambda: nn.Sequential(nn.Linear(24, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN)), seed=4)


def save_text(folder: Path, model: Any, tokenizer: Any) -> None:
    """The config and the tokenizer of a language model, without its weights."""
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def llava_config(model: Any, tower: Path, model_type: str = "llava_llama", **changes: Any) -> dict[str, Any]:
    """A config.json as LLaVA writes it: flat, with the keys of older versions of transformers."""
    raw = model.config.to_dict()
    rope = raw.pop("rope_parameters", None) or {}
    return {
        **raw,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "model_type": model_type,
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": str(tower),
        "mm_hidden_size": 24,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "torch_dtype": "float16",
        "transformers_version": "4.37.2",
        **changes,
    }


def write(folder: Path, raw: dict[str, Any], tensors: Tensors, tokenizer: Any | None = None) -> Path:
    """config.json, one safetensors file and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    copies = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


@torch.no_grad()
def reference_logits(
    model: Any,
    features: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor],
    ids: Tensor,
    pixels: Tensor,
    at: int,
) -> Tensor:
    """LLaVA by hand: embeddings of the text around one picture's projected features, through the language model.

    Args:
        features: pixels to the selected features (1, N, C).
        ids: (1, S) text without placeholders; the picture stands before position `at`.
    """
    words = model.get_input_embeddings()(ids)
    picture = project(features(pixels))
    return model(inputs_embeds=torch.cat([words[:, :at], picture, words[:, at:]], dim=1)).logits


def inputs(image_token: int, num_tokens: int = 4, at: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """(ids without placeholders, ids with them, pixels)."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 400, (1, 9), generator=generator)
    full = torch.cat([ids[:, :at], torch.full((1, num_tokens), image_token), ids[:, at:]], dim=1)
    return ids, full, torch.randn(1, 3, 16, 16, generator=generator)


def clip_features(tower: Any, layer: int = -2) -> Callable[[Tensor], Tensor]:
    """Without the class token."""
    return lambda pixels: tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]


def linear_projector() -> nn.Linear:
    """LLaVA's first projector."""
    return seeded(lambda: nn.Linear(24, HIDDEN), seed=4)


def deep_projector() -> nn.Sequential:
    """mlp3x_gelu."""

    def make() -> nn.Sequential:
        later = (nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
        return nn.Sequential(nn.Linear(24, HIDDEN), *later, nn.GELU(), nn.Linear(HIDDEN, HIDDEN))

    return seeded(make, seed=4)


def whole(
    folder: Path,
    family: str = "llama",
    saved_tower: bool = False,
    project: nn.Module | None = None,
    extra: Tensors | None = None,
    **changes: Any,
) -> tuple[Path, Any, Any, Any]:
    """A whole LLaVA checkpoint: (directory, decoder, tower, projector)."""
    tower_dir, tower = tower_folder(folder / "tower")
    model, project = decoder(family), projector() if project is None else project
    tensors = dict(model.state_dict()) | prefixed("model.mm_projector.", project.state_dict()) | (extra or {})
    if saved_tower:
        tower.requires_grad_(False)
        for parameter in tower.parameters():  # trained: another tower than in its own directory
            parameter.mul_(1.1)
        saved = {bare(name): value for name, value in tower.state_dict().items()}
        tensors |= prefixed("model.vision_tower.vision_tower.vision_model.", saved)
    if changes.pop("tied", False):
        tie(model)
        tensors.pop("lm_head.weight")
    raw = llava_config(model, tower_dir, **changes)
    return write(folder / "checkpoint-5", raw, tensors, tiny_llama_tokenizer()), model, tower, project


def tie(model: Any) -> None:
    """The head becomes the embedding, as in small decoders, whose files then hold one of the two."""
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True


def stage_one(folder: Path) -> tuple[Path, Path, Any, Any, Any]:
    """`mm_projector.bin` alone: (directory, base, decoder, tower, projector)."""
    tower_dir, tower = tower_folder(folder / "tower")
    model, project = decoder(), projector()
    base = write(folder / "vicuna", model.config.to_dict(), model.state_dict(), tiny_llama_tokenizer())
    path = folder / "stage1"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(llava_config(model, tower_dir)))
    torch.save(prefixed("model.mm_projector.", project.state_dict()), path / "mm_projector.bin")
    return path, base, model, tower, project


def lora(folder: Path, **options: Any) -> tuple[Path, Path, Any, Any, Any]:
    """Adapters as peft writes them: (directory, base, decoder with the adapters merged by peft, tower, projector)."""
    from peft import LoraConfig, get_peft_model

    tower_dir, tower = tower_folder(folder / "tower")
    model, project = decoder(), projector()
    base = write(folder / "vicuna", model.config.to_dict(), model.state_dict(), tiny_llama_tokenizer())
    raw = llava_config(model, tower_dir)
    chosen = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], **options)
    adapted: Any = get_peft_model(model, chosen)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    path = folder / "any-name"
    adapted.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(raw))
    torch.save(prefixed("base_model.model.model.mm_projector.", project.state_dict()), path / "non_lora_trainables.bin")
    return path, base, adapted.merge_and_unload(), tower, project
