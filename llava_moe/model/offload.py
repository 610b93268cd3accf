"""Models larger than memory, run layer by layer: the weights of a layer are read when it is called and dropped after.

accelerate's disk offload does the same for files whose tensors are the parameters; ours hold each expert by itself, and
putting them together must not take twice the memory of a layer. So the hooks here read through `StoredModel`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer

from llava_moe.model.assemble import load_model
from llava_moe.model.families import MODEL_TYPES
from llava_moe.model.foreign import is_foreign
from llava_moe.model.layout import StoredModel
from llava_moe.model.streaming import CheckpointReader

WHOLE_MODEL_BYTES = 1 << 30  # in float32; a smaller model is simply loaded


def open_model(path: str | Path, whole_bytes: int | None = None) -> Any:
    """A model in float32 and evaluation mode, without gradients of its parameters.

    Args:
        path: a checkpoint of ours, a stock image-text-to-text one, or that of a causal language model.
        whole_bytes: a model that takes more is run layer by layer; the default is `WHOLE_MODEL_BYTES`.

    Raises:
        CheckpointError: tensors are missing or have the wrong shape.
    """
    path = Path(path)
    if CheckpointReader(path).float32_bytes > (WHOLE_MODEL_BYTES if whole_bytes is None else whole_bytes):
        return stream_layers(StoredModel(path))
    if json.loads((path / "config.json").read_text())["model_type"] in MODEL_TYPES:
        return load_model(path).requires_grad_(False)
    kind: Any = AutoModelForCausalLM
    if is_foreign(json.loads((path / "config.json").read_text())["model_type"]):
        kind = AutoModelForImageTextToText
    return kind.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)


def is_streamed(model: nn.Module) -> bool:
    """Whether `open_model` gave a model that reads its layers as it runs."""
    return any(parameter.is_meta for parameter in model.parameters())


def stream_layers(stored: StoredModel) -> Any:
    """The empty model of a checkpoint, each of whose layers is loaded for the time of its call.

    Embeddings, projector and vocabulary projection are such units too; norms and other small parameters are loaded now.
    Where gradients are asked for, a unit runs and is loaded once more in the backward, or its weights would be kept.
    """
    model = stored.model
    inside: set[str] = set()
    for prefix, unit in _units(model):
        inside.update(_Unit(stored, unit, prefix).slots)
    for key, module, name in _slots(model, ""):
        if key not in inside and key in stored.state:
            _put(module, name, stored.read(key, stored.state[key].dtype))
    return model


def _units(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are loaded one at a time; none lies inside another."""
    single = [model.get_input_embeddings(), model.get_output_embeddings()]
    projector = getattr(model.base_model, "multi_modal_projector", None)
    taken: list[str] = []
    for name, module in model.named_modules():
        chosen = isinstance(module, GradientCheckpointingLayer) or any(module is s for s in (*single, projector))
        if chosen and not any(name.startswith(f"{other}.") for other in taken):
            taken.append(name)
            yield name, module


def _slots(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, str]]:
    """(name in the model, owner, name in the owner) of every parameter and persistent buffer."""
    for path, child in module.named_modules(remove_duplicate=False):
        names = [name for name, parameter in child._parameters.items() if parameter is not None]
        names += [
            name
            for name, buffer in child._buffers.items()
            if buffer is not None and name not in child._non_persistent_buffers_set
        ]
        for name in names:
            yield ".".join(part for part in (prefix, path, name) if part), child, name


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


class _Unit:
    """Fills one module before its forward and empties it after."""

    def __init__(self, stored: StoredModel, module: nn.Module, prefix: str) -> None:
        self.stored = stored
        self.module = module
        self.slots = {key: (owner, name) for key, owner, name in _slots(module, prefix) if key in stored.state}
        self._forward = module.forward
        # Not a pair of hooks: these lie outside of what is run again in the backward.
        module.forward = self.call  # type: ignore[method-assign]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.load()
        try:
            return self._forward(*args, **kwargs)
        finally:
            self.drop()

    def load(self) -> None:
        for key, (owner, name) in self.slots.items():
            _put(owner, name, self.stored.read(key, self.stored.state[key].dtype))

    def drop(self) -> None:
        for key, (owner, name) in self.slots.items():
            _put(owner, name, self.stored.state[key])
