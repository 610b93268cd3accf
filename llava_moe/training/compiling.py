"""torch.compile of each decoder layer by itself.

The whole model is no graph: pictures are scattered by data, routings are recorded, a tower may be frozen. A decoder
layer is one, and all layers share what was compiled for the first, once for fixed and once for changing lengths. Layers
with experts compile around them: how many tokens an expert gets is data, what a router says is kept in a dictionary
outside of the graph, and torch's grouped product refuses float32 while it is traced (torch 2.13).

On a CPU a process that is killed while the compiler writes leaves half a file in torch's cache, and the next one stops
at it ("file too short"): delete the folder that the message names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_moe.config import RecipeError, RunConfig
from llava_moe.model.sites import find_blocks
from llava_moe.moe import MoELayer

_WHOLE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def check_compiling(config: RunConfig) -> None:
    """Raises RecipeError for the Trainer's own keys, which compile the whole model, and for layers under ZeRO-3."""
    for key in _WHOLE:
        if config.train.get(key):
            raise RecipeError(f"train.{key} compiles the whole model; set speed.compile_layers=true")
    if config.speed.compile_layers and config.deepspeed is not None:
        zero = json.loads(Path(config.deepspeed).read_text(encoding="utf-8")).get("zero_optimization", {})
        if int(zero.get("stage", 0)) == 3:
            raise RecipeError(
                f"speed.compile_layers: under ZeRO-3 ({config.deepspeed}) parameters come and go inside of the layers; "
                "use ZeRO-2, or leave it off"
            )


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Makes the decoder's layers compile when they first run; names and parameters stay as they are."""
    for layer in find_blocks(model.model.language_model).layers:
        for module in layer.modules():
            if isinstance(module, MoELayer):
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        layer.compile(backend=backend)


def is_compiled(model: nn.Module) -> bool:
    """Whether any module of the model is compiled."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
