"""The vision tower of a LLaVA-like checkpoint: config and weights, from the checkpoint or from its own directory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig

from llava_moe.model.formats.parts import Options, Parts
from llava_moe.model.formats.tensors import Lazy, State, read_folder
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.vision_composite import multi_scale_config

_LAYER = re.compile(r"(?:vision_model\.)?encoder\.layers\.(\d+)\.")
_OTHER_HALF = ("text_model.", "visual_projection.", "text_projection.", "logit_", "model.")
_NORM = "vision_model.post_layernorm."


@dataclass(frozen=True)
class Tower:
    """What the rest of the import must know of a tower.

    Attributes:
        folder: with preprocessor_config.json.
        config: that of the tower alone.
        state: its tensors, by names inside the tower.
        feature_layer: as in LlavaConfig, counted in the layers that there are.
        strategy: "default" drops the class token.
        num_extra: tokens beyond the grid.
        num_tokens: of a picture, after selection.
    """

    folder: Path
    config: Any
    state: State
    feature_layer: int
    strategy: str
    num_extra: int
    num_tokens: int


def read_tower(parts: Parts, options: Options) -> Tower:
    """Puts the tower's config and weights together.

    Raises:
        CheckpointError: the directory is missing or holds no tower, or the selected features do not exist.
    """
    folder = _folder(parts, options)
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not the directory of a vision tower: {str(error).splitlines()[0]}") from error
    config = getattr(config, "vision_config", config)
    for key in ("num_hidden_layers", "image_size", "patch_size", "hidden_size"):
        if not isinstance(getattr(config, key, None), int):
            raise CheckpointError(f"{folder}: {type(config).__name__} has no {key}; this is no tower that LLaVA uses")
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # SigLIP's pooling head is behind every layer that LLaVA reads
    state = dict(parts.tower) or _own_weights(folder)
    layers = [int(match[1]) for name in state if (match := _LAYER.match(name)) is not None]
    if not layers:
        raise CheckpointError(f"{folder}: no layers of a vision tower among its {len(state)} tensors")
    # LLaVA-NeXT and CuMo cut layers off that lie behind the features; the index counts from the end.
    cut = config.num_hidden_layers - (max(layers) + 1)
    feature_layer = int(parts.raw.get("mm_vision_select_layer", -2))
    feature_layer += cut if feature_layer < 0 else 0
    config.num_hidden_layers -= cut
    if cut < 0 or not -config.num_hidden_layers - 1 <= feature_layer < (0 if cut else config.num_hidden_layers + 1):
        raise CheckpointError(
            f"{parts.where}: its tower has {max(layers) + 1} layers, {folder} has {config.num_hidden_layers + cut}, "
            f"and mm_vision_select_layer={parts.raw.get('mm_vision_select_layer', -2)} is not among them"
        )
    _fill_norm(state, config, parts.where)
    tower = _selected(folder, config, state, feature_layer, parts.raw)
    return tower if parts.scales == (1,) else _at_scales(tower, parts.scales)


def _selected(folder: Path, config: Any, state: State, feature_layer: int, raw: dict[str, Any]) -> Tower:
    has_class = any(name.endswith("embeddings.class_embedding") for name in state)
    # LLaVA-NeXT's SigLIP code never drops a token, whatever mm_vision_select_feature says: there is no class token.
    patches_only = raw.get("mm_vision_select_feature", "patch") == "patch"
    grid = (config.image_size // config.patch_size) ** 2
    strategy = "default" if has_class and patches_only else "full"
    num_tokens = grid + (1 if has_class and not patches_only else 0)
    return Tower(folder, config, state, feature_layer, strategy, int(has_class), num_tokens)


def _at_scales(tower: Tower, scales: tuple[int, ...]) -> Tower:
    """The tower inside one that shows it the picture at several scales; its input stays that of the smallest."""
    inner = tower.config
    config = multi_scale_config(inner, tower.feature_layer, list(scales))
    config.image_size, config.patch_size = inner.image_size, inner.patch_size
    state = {f"tower.{name}": lazy for name, lazy in tower.state.items()}
    return Tower(tower.folder, config, state, -1, "full", 0, tower.num_tokens)


def _folder(parts: Parts, options: Options) -> Path:
    if options.tower is not None:
        if not options.tower.is_dir():
            raise CheckpointError(f"--vision-tower {options.tower}: no such directory")
        return options.tower
    named = parts.raw.get("mm_vision_tower")
    if not named:
        raise CheckpointError(f"{parts.where}: config.json names no mm_vision_tower; name one: --vision-tower")
    if Path(named).is_dir():
        return Path(named)
    try:
        return Path(snapshot_download(str(named), allow_patterns=["*.json", "*.safetensors", "pytorch_model.bin"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{parts.where}: config.json names the vision tower {named}, which is no directory here and could not be "
            f"fetched ({type(error).__name__}); name its directory with --vision-tower"
        ) from error


def _own_weights(folder: Path) -> State:
    """Those of the tower, out of a model that may have a text side too."""
    return {name: lazy for name, lazy in read_folder(folder).items() if not name.startswith(_OTHER_HALF)}


def _fill_norm(state: State, config: Any, where: str) -> None:
    """CuMo left out the norm behind the features; the module exists, and never matters."""
    if config.model_type == "clip_vision_model" and not any("post_layernorm." in name for name in state):
        for name, value in (("weight", torch.ones), ("bias", torch.zeros)):
            state[_NORM + name] = Lazy.of(value(config.hidden_size), f"{where}: filled in")
