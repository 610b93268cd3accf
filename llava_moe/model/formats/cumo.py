"""CuMo (2405.05949): experts in the projector and in every layer of the CLIP tower, a dense or a Mixtral decoder.

    model.mm_projector.gate.weight, model.mm_projector.experts.E.{0,2}.*
    model.vision_tower.vision_model.encoder.layers.L.gate.weight, .experts.E.{fc1,fc2}.*; or clip.bin, dense

CuMo's tower returns the input of its last layer, whatever `mm_vision_select_layer` says, and has no final norm. Here
the tower ends before that layer, whose experts never did anything. With `scales: [1, 3]`, as in the published models,
it sees the picture once more three times as large, which is enlarged from the pixels of the first (S2, 2403.13043).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llava_moe.model.formats.parts import Options, Parts, moe_part, renamed, split
from llava_moe.model.formats.tensors import TOWER_FILE, State, read_file, read_json
from llava_moe.model.modeling import CheckpointError

_TOWER_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.(.+)")
_TOWER_EXPERT = re.compile(
    r"vision_model\.encoder\.layers\.(\d+)\.(?:gate\.weight|experts\.(\d+)\.(fc1|fc2)\.(weight|bias))"
)
_PROJECTOR_EXPERT = re.compile(r"(?:gate\.weight|experts\.(\d+)\.([02])\.(weight|bias))")
_HALVES = {"fc1": "up", "fc2": "down", "0": "up", "2": "down"}


def read_cumo(path: Path, state: State, options: Options) -> Parts:
    """A whole model, with sections for the parts that have experts.

    Raises:
        CheckpointError: the scales are none that can be had, or config.json does not say how many experts are used.
    """
    raw = read_json(path / "config.json")
    parts = split(state, {**raw, "mm_vision_select_layer": -2}, path, path)
    parts.scales = _scales(path, raw)
    if not parts.tower and (path / TOWER_FILE).is_file():
        for name, lazy in read_file(path / TOWER_FILE).items():
            parts.tower["vision_model." + name.partition("vision_model.")[2]] = lazy
    _cut_last_layer(parts)
    _tower_experts(parts)
    _projector_experts(parts)
    return parts


def _scales(path: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    scales = list(raw.get("scales") or [1])
    if scales != sorted(set(scales)) or scales[0] != 1 or any(scale != int(scale) for scale in scales):
        raise CheckpointError(
            f"{path / 'config.json'}: scales={scales} must be whole numbers that ascend from 1 to be imported"
        )
    if len(scales) > 1 and raw.get("mm_vision_select_feature", "patch") != "patch":
        raise CheckpointError(f"{path / 'config.json'}: several scales have no class token (mm_vision_select_feature)")
    return tuple(int(scale) for scale in scales)


def _k(parts: Parts) -> int:
    k = parts.raw.get("num_selected")
    if not isinstance(k, int):
        raise CheckpointError(f"{parts.where}: config.json has no num_selected, the number of experts of a token")
    return k


def _cut_last_layer(parts: Parts) -> None:
    layers = [int(match[1]) for name in parts.tower if (match := _TOWER_LAYER.fullmatch(name)) is not None]
    if not layers:
        raise CheckpointError(f"{parts.where}: neither its weights nor a {TOWER_FILE} hold a tower (vision_model.*)")
    last = f"vision_model.encoder.layers.{max(layers)}."
    parts.tower = {name: lazy for name, lazy in parts.tower.items() if not name.startswith(last)}


def _tower_experts(parts: Parts) -> None:
    counts: dict[int, int] = {}
    for name in parts.tower:
        match = _TOWER_EXPERT.fullmatch(name)
        if match is not None and match[2] is not None:
            counts[int(match[1])] = max(counts.get(int(match[1]), 0), int(match[2]) + 1)
    if counts:
        parts.tower = renamed(parts.tower, _TOWER_EXPERT, _tower_name)
        parts.moe["vision"] = moe_part(counts, _k(parts), "softmax_topk_renorm")


def _tower_name(match: re.Match[str]) -> str:
    block = f"vision_model.encoder.layers.{match[1]}.mlp"
    if match[2] is None:
        return f"{block}.router.scorer.weight"
    return f"{block}.experts.{match[2]}.{_HALVES[match[3]]}.{match[4]}"


def _projector_experts(parts: Parts) -> None:
    found = [match for name in parts.projector if (match := _PROJECTOR_EXPERT.fullmatch(name)) is not None]
    experts = [int(match[1]) for match in found if match[1] is not None]
    if experts:
        parts.projector = renamed(parts.projector, _PROJECTOR_EXPERT, _projector_name)
        parts.moe["projector"] = moe_part({0: max(experts) + 1}, _k(parts), "softmax_topk_renorm")


def _projector_name(match: re.Match[str]) -> str:
    if match[1] is None:
        return "router.scorer.weight"
    return f"experts.{match[1]}.{_HALVES[match[2]]}.{match[3]}"
