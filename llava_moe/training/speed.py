"""What a recipe says of attention, loss and compilation: checked early, settled on the machine, and said aloud."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, TrainingArguments

from llava_moe.config import RecipeError, RunConfig
from llava_moe.model import attention
from llava_moe.model.head import choose_fused_loss
from llava_moe.model.loss import OFF, resolve_fused_loss
from llava_moe.training.compiling import check_compiling, compile_layers, is_compiled
from llava_moe.training.offload import check_offload

# Keys that change how a result is computed and not which: a run may go on, or be found finished, with others.
INTERCHANGEABLE = frozenset({"model.attn_implementation", "speed.fused_loss", "speed.compile_layers"})


def check_names(config: RunConfig) -> None:
    """Raises RecipeError for what no machine knows."""
    try:
        attention.check_name(config.model.attn_implementation)
        resolve_fused_loss(config.speed.fused_loss, None)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    check_compiling(config)


def check_speed(config: RunConfig, arguments: TrainingArguments) -> None:
    """Raises RecipeError for what cannot be had on this machine; before data or weights are touched."""
    check_names(config)
    check_offload(config.deepspeed)
    device = arguments.device.type
    try:
        attention.resolve_attention(config.model.attn_implementation, None, compute_dtype(config, arguments), device)
        resolve_fused_loss(config.speed.fused_loss, device)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def compute_dtype(config: RunConfig, arguments: TrainingArguments) -> torch.dtype:
    """Of the matrix products of a run."""
    if arguments.bf16:
        return torch.bfloat16
    if arguments.fp16:
        return torch.float16
    return torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32


def attention_for(config: RunConfig, arguments: TrainingArguments, checkpoint: Path) -> str | dict[str, str] | None:
    """What to load a checkpoint with, see `resolve_attention`."""
    text = AutoConfig.from_pretrained(checkpoint).get_text_config()
    dtype, device = compute_dtype(config, arguments), arguments.device.type
    return attention.resolve_attention(config.model.attn_implementation, text, dtype, device)


def apply_speed(model: nn.Module, config: RunConfig, arguments: TrainingArguments) -> None:
    """Sets loss and compilation of a loaded model.

    Raises:
        ValueError: its vocabulary projection cannot do what is asked for.
    """
    choose_fused_loss(model, config.speed.fused_loss, arguments.device.type)
    if config.speed.compile_layers:
        compile_layers(model)


def speed_facts(model: Any) -> dict[str, str]:
    """What a run came to use, as it is printed and kept in done.json."""
    return {
        "attention": attention.attention_of(model),
        "fused_loss": getattr(model.lm_head, "fused_loss", OFF),
        **({"compiled": "decoder layers"} if is_compiled(model) else {}),
    }
