"""What the tests of adapters share: recipes, and models whose adapters have left zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_moe.config import RunConfig
from llava_moe.model.assemble import load_model
from llava_moe.training.lora import add_adapters
from tests.tiny_model import tiny_model, tiny_processor, tiny_text_config
from tests.training.runs import make_config

RATES = {"lora": 1e-2, "projector": 1e-2}
MOE_RATES = {**RATES, "router": 1e-2}
BALANCE = {"losses": {"switch": 0.1, "z": 0.01}}


def lora_config(folder: Path, checkpoint: Path, data: tuple[Path, Path], /, **sections: Any) -> RunConfig:
    """A recipe with small adapters on all there is; values of the section and other sections as given."""
    lora = {"rank": 4, "alpha": 8, **sections.pop("lora", {})}
    return make_config(folder, checkpoint, data, **{"stage": {"learning_rates": RATES}, **sections, "lora": lora})


def adapted(checkpoint: Path, config: RunConfig, dtype: torch.dtype = torch.float32, std: float = 0.2) -> Any:
    """The model of a recipe with adapters that do something, in evaluation mode."""
    model = load_model(checkpoint, dtype)
    add_adapters(model, config, checkpoint, torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def inputs_of(model: Any) -> dict[str, Tensor]:
    """Pictures and text."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (2, 12), generator=generator)
    ids[:, :4] = model.config.image_token_id
    size = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, size, size, generator=generator).to(model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model.eval()(**inputs_of(model)).logits.float()


def write_wide_checkpoint(path: Path, moe: dict[str, Any] | None = None) -> Path:
    """One whose decoder has widths of 64 and 128, as blocks of 4-bit weights ask for."""
    text = tiny_text_config()
    text.hidden_size, text.intermediate_size, text.head_dim, text.num_hidden_layers = 64, 128, 16, 2
    model, processor = tiny_model(moe, text_config=text), tiny_processor()
    model.generation_config.eos_token_id = processor.stop_token_ids
    model.generation_config.pad_token_id = processor.pad_token_id
    model.save_pretrained(path, save_original_format=True)
    processor.save_pretrained(path)
    return path
