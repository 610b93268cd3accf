"""A tower from what a recipe calls it: its config alone, or with its weights.

`model.vision_tower` is one of

    DIR                       a directory or hub id of a transformers tower: SigLIP, SigLIP2, CLIP, DINOv2, ...
    timm:ARCH                 the final grid of a timm model, weights from model.vision_weights
    timm:ARCH@LAYER           the grid behind a block (transformer) or stage (convolutions) of it
    open_clip:NAME            a tower of open_clip (a name or the JSON file of its config), likewise
    open_clip:NAME@LAYER      where open_clip takes it from timm
    fused:DIR@LAYER+DIR@LAYER channels of several towers, each with its feature layer (-2 where none is named)
    s2:1,2:DIR@LAYER          one tower at several scales

A tower takes pictures of the size that it was trained with. `model.image_size` sets another for SigLIP2 NaFlex and for
DINOv2, whose position tables are resampled; for others it must be their own. Beside other towers DINOv2 takes the size
that gives their grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel

from llava_moe.config import ModelSection
from llava_moe.model.vision import TimmTower, TimmTowerConfig, timm_tower_config
from llava_moe.model.vision_composite import (
    check_same_grids,
    fuse_towers,
    fused_config,
    grid_of,
    multi_scale_config,
    scale_tower,
)
from llava_moe.model.vision_convert import (
    RESIZABLE,
    clip_config,
    clip_state,
    dinov2_at,
    naflex_config,
    open_clip_config,
    open_clip_timm,
    resized_config,
    siglip_from_naflex,
)
from llava_moe.model.vision_images import channel_statistics
from llava_moe.model.vision_names import MissingTowerError, split_source, with_layer, with_scales

_NAFLEX = "siglip2_vision_model"
_DEFAULT_LAYER = -2
_HEADS = ("classifier.", "head.", "fc.", "attn_pool.")


@dataclass(frozen=True)
class Part:
    """A tower of transformers, alone or inside another.

    Attributes:
        source: its directory or hub id.
        layer: its feature layer, inside another.
        stored: its config in the files.
        used: that of the tower as it is used, at another image size for example.
    """

    source: str
    layer: int
    stored: Any
    used: Any


@dataclass(frozen=True)
class Named:
    """What `model.vision_tower` names.

    Attributes:
        config: of the tower that comes out.
        parts: the towers of transformers that it is made of; none for timm and open_clip.
    """

    kind: str
    rest: str
    config: Any
    parts: tuple[Part, ...] = ()


def read_tower(
    section: ModelSection,
    read_config: Callable[[str], Any] | None = None,
    statistics: Callable[[str], tuple[list[float], list[float]]] = channel_statistics,
) -> Named:
    """Reads what a recipe names, without any weights.

    Args:
        read_config: gives the config of a directory or hub id; None asks transformers.
        statistics: gives the mean and deviation of the channels that it was trained with.

    Raises:
        MissingTowerError: it is not on this machine.
        ValueError: the name or the sizes are wrong, or the parts do not fit each other.
    """
    kind, rest = split_source(str(section.vision_tower))
    if section.vision_weights is not None and kind not in ("timm", "open_clip"):
        raise ValueError(
            f"model.vision_weights={section.vision_weights}: only timm: and open_clip: towers read it; "
            f"{section.vision_tower} has its own weights"
        )
    if kind == "timm":
        if section.image_size is None:
            raise ValueError("model.image_size must be set for a timm tower")
        architecture, layer = with_layer(rest)
        return Named(kind, rest, timm_tower_config(architecture, section.image_size, layer=layer))
    if kind == "open_clip":
        named = Named(kind, rest, _open_clip(rest))
        _check_image_size(section, [named.config])
        return named
    parts = _parts(kind, rest, section, read_config or _read_config)
    _check_image_size(section, [part.used for part in parts])
    configs, layers = [part.used for part in parts], [part.layer for part in parts]
    config: Any = configs[0]
    if kind == "fused":
        colours = [statistics(part.source) for part in parts]
        config = fused_config(configs, layers, [mean for mean, _ in colours], [std for _, std in colours])
    elif kind == "s2":
        config = multi_scale_config(config, layers[0], with_scales(rest)[0])
    return Named(kind, rest, config, parts)


def load_tower(section: ModelSection) -> Any:
    """The tower that the recipe names, with its weights, in evaluation mode.

    Raises:
        MissingTowerError: it is not on this machine.
        ValueError: as `read_tower`; or the weights are not named or do not fit.
    """
    named = read_tower(section)
    if named.kind in ("timm", "open_clip"):
        return _with_weights(named, section).eval()
    towers = [_load_part(part, section.random_weights) for part in named.parts]
    if named.kind == "fused":
        return fuse_towers(towers, named.config).eval()
    return (scale_tower(towers[0], named.config) if named.kind == "s2" else towers[0]).eval()


def _parts(kind: str, rest: str, section: ModelSection, read_config: Callable[[str], Any]) -> tuple[Part, ...]:
    sources = rest.split("+") if kind == "fused" else [with_scales(rest)[1] if kind == "s2" else rest]
    if kind == "fused" and len(sources) < 2:
        raise ValueError("model.vision_tower=fused: name at least two towers, as in fused:SIGLIP+DINOV2")
    named = [with_layer(source) if kind else (source, None) for source in sources]
    for source, _ in named:
        inner = split_source(source)[0]
        if inner:
            raise ValueError(f"model.vision_tower={kind}:{rest}: takes towers of transformers, and no {inner}: inside")
    stored = [_stored_config(source, read_config) for source, _ in named]
    fixed = [index for index, config in enumerate(stored) if config.model_type not in RESIZABLE]
    first = _as_used(stored[fixed[0] if fixed else 0], section.image_size, section)
    used = []
    for config in stored:
        resizable = config.model_type in RESIZABLE
        size = grid_of(first) * int(config.patch_size) if resizable and kind == "fused" else section.image_size
        used.append(_as_used(config, size, section))
    if kind == "fused":
        check_same_grids(used)
    return tuple(
        Part(source, _DEFAULT_LAYER if layer is None else layer, before, after)
        for (source, layer), before, after in zip(named, stored, used, strict=True)
    )


def _read_config(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        raise MissingTowerError(f"model.vision_tower={source}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise ValueError(f"model.vision_tower={source}: {str(error).splitlines()[0]}") from error


def _stored_config(source: str, read_config: Callable[[str], Any]) -> Any:
    """The config of a tower in its files, also of the one inside a larger model."""
    found = read_config(source)
    config = getattr(found, "vision_config", found)
    keys = ("hidden_size", "patch_size") + (() if config.model_type == _NAFLEX else ("image_size",))
    for key in keys:
        if not isinstance(getattr(config, key, None), int):
            raise ValueError(
                f"model.vision_tower={source}: {type(config).__name__} has no whole number {key}; write timm: for "
                "towers that are no vision transformers for square pictures"
            )
    if type(config) not in AutoModel._model_mapping:  # type: ignore[attr-defined]
        raise ValueError(f"model.vision_tower={source}: transformers has no tower for {config.model_type}")
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False  # SigLIP's pooling head is behind every layer that LLaVA reads
    return config


def _as_used(stored: Any, image_size: int | None, section: ModelSection) -> Any:
    """The config of the tower at the size that it will be used at."""
    if stored.model_type == _NAFLEX:
        if image_size is None:
            raise ValueError(
                f"model.image_size must be set: {section.vision_tower} (SigLIP2 NaFlex) takes pictures of any size"
            )
        return naflex_config(stored, image_size)
    if stored.model_type in RESIZABLE and image_size is not None:
        return resized_config(stored, image_size)
    return stored


def _check_image_size(section: ModelSection, configs: list[Any]) -> None:
    sizes = {int(config.image_size) for config in configs}
    if section.image_size is not None and section.image_size not in sizes:
        raise ValueError(
            f"model.image_size={section.image_size}: {section.vision_tower} takes pictures of "
            f"{' and '.join(map(str, sorted(sizes)))} px"
        )


def _load_part(part: Part, random_weights: bool) -> Any:
    if random_weights:
        tower = AutoModel.from_config(part.stored, dtype=torch.float32)
    else:
        kind: Any = AutoModel._model_mapping[type(part.stored)]  # type: ignore[attr-defined]
        tower, info = kind.from_pretrained(
            part.source, config=part.stored, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(f"model.vision_tower={part.source}: missing {sorted(info['missing_keys'])[:4]}")
    if part.stored.model_type == _NAFLEX:
        return siglip_from_naflex(tower, int(part.used.image_size))
    if part.stored.model_type in RESIZABLE:
        return dinov2_at(tower, int(part.used.image_size))
    return tower


def _open_clip(rest: str) -> Any:
    """The config of the stock or timm tower that an open_clip tower becomes."""
    name, layer = with_layer(rest)
    model = open_clip_config(name)
    found = open_clip_timm(model)
    if found is not None:
        return timm_tower_config(*found, layer=layer)
    if layer is not None:
        raise ValueError(
            f"model.vision_tower=open_clip:{rest}: becomes a CLIP tower of transformers; name its layer by "
            "model.vision_feature_layer"
        )
    return clip_config(model, name)


def _with_weights(named: Named, section: ModelSection) -> Any:
    """A timm or open_clip tower with the weights of `model.vision_weights`."""
    of_timm = isinstance(named.config, TimmTowerConfig)
    tower = TimmTower(named.config) if of_timm else AutoModel.from_config(named.config)
    file = section.vision_weights
    if file is None:
        if section.random_weights:
            return tower
        what = with_layer(named.rest)[0]
        raise ValueError(
            f"model.vision_weights must name the safetensors of {what}; set model.random_weights=true to train on a "
            "random tower on purpose"
        )
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model.vision_weights={file}: {str(error).splitlines()[0]}") from error
    if of_timm:
        _fill(tower.backbone, state, file)
    else:
        tower.load_state_dict(clip_state(state, tower.state_dict(), file))
    return tower


def _fill(backbone: Any, state: dict[str, Tensor], file: str) -> None:
    """Loads a timm model, whose names open_clip puts below visual.trunk.

    The classification head is left out by name, and only where the tower has none of its own.
    """
    below = "visual.trunk."
    state = {k.removeprefix(below): v for k, v in state.items() if k.startswith(below)} or state
    own = backbone.state_dict()
    kept = {k: v for k, v in state.items() if k in own or not k.startswith(_HEADS)}
    # older files do not count the batches of their norms, which torch admits and nothing here reads
    missing = sorted(key for key in own if key not in kept and not key.endswith(".num_batches_tracked"))
    unplaced = sorted(kept.keys() - own.keys())
    if missing or unplaced:
        raise ValueError(f"{file}: missing {missing[:3] or 'nothing'}, without a place {unplaced[:3] or 'nothing'}")
    for key, tensor in kept.items():
        if tensor.shape != own[key].shape:
            raise ValueError(f"{file}: {key} is {tuple(tensor.shape)} and the tower has {tuple(own[key].shape)}")
    backbone.load_state_dict(kept)


@torch.no_grad()
def count_tokens(tower: Any, section: ModelSection) -> tuple[int, int]:
    """Features of a picture that the projector is given, and the cells of the tower's patch grid.

    Args:
        tower: with weights, or a hollow one on the meta device.

    Raises:
        ValueError: the feature selection does not fit the tower.
    """
    size, patch = tower.config.image_size, tower.config.patch_size
    pixels = torch.zeros(1, 3, size, size, device=tower.device)
    features = tower(pixels, output_hidden_states=True).hidden_states
    num_tokens, grid = features[-1].shape[1], (size // patch) ** 2
    strategy, extra = section.vision_feature_select_strategy, num_tokens - grid
    if strategy not in ("default", "full"):
        raise ValueError(f"model.vision_feature_select_strategy={strategy}: must be default or full")
    if strategy == "default" and extra > 1:
        raise ValueError(
            f"model.vision_feature_select_strategy=default drops the first token as CLS, but {section.vision_tower} "
            f"has {extra} tokens before its patches; use full, or s2:1:{section.vision_tower} for the patches alone"
        )
    if strategy == "default" and extra != 1:
        raise ValueError(
            f"model.vision_feature_select_strategy=default drops the first token as CLS, but {section.vision_tower} "
            "has none and would lose a patch; use full"
        )
    if not -len(features) <= section.vision_feature_layer < len(features):
        raise ValueError(
            f"model.vision_feature_layer={section.vision_feature_layer}: {section.vision_tower} has {len(features)} "
            "feature layers"
        )
    return (num_tokens - 1 if strategy == "default" else num_tokens), grid
