"""What every importer takes a checkpoint apart into, whatever its layout was."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_moe.model.formats.tensors import Lazy, State
from llava_moe.model.modeling import CheckpointError

_TOWER = re.compile(r"^model\.(?:vision_tower|image_tower)\.(?:vision_tower\.|image_tower\.)?(.+)$")
_PROJECTOR = re.compile(r"^(?:model\.)?mm_projector\.(?:image_spatial_proj\.)?(.+)$")
_NEWLINE = "model.image_newline"
_VIDEO = re.compile(r"video_tower|video_patch_proj|video_spatial_proj|video_temproal_proj|vision_resampler")


@dataclass(frozen=True)
class Options:
    """What the layouts do not say and the user adds.

    Attributes:
        base: the language model that a projector or adapters belong to.
        tower: directory of the vision tower, with its config.json and preprocessor_config.json.
        image_mode: in the place of config.json's image_aspect_ratio.
        read_grids: LLaVA's `image_grid_pinpoints` and the side of a tile to (height, width) in pixels. Data code knows
            how, which models do not import; `llava_moe.convert` fills it in.
    """

    base: Path | None = None
    tower: Path | None = None
    image_mode: str | None = None
    read_grids: Callable[[Any, int], Sequence[Sequence[int]]] | None = None


@dataclass
class Parts:
    """A LLaVA-like checkpoint in its parts.

    Attributes:
        raw: its config.json.
        where: the directory, for messages.
        text: the directory with the tokenizer.
        decoder: under LLaVA's names, `model.layers...`, `lm_head.weight`.
        projector: without the prefix: `0.weight`, or `experts.0.0.weight` and `gate.weight`.
        tower: as in the tower's own files, `vision_model...`; empty where it was not saved.
        newline: the learned end of a row of tiles, which only anyres models use.
        moe: sections of our config, by part.
        scales: at which the tower sees a picture (S2); the first is 1, the picture itself.
    """

    raw: dict[str, Any]
    where: str
    text: Path
    decoder: State = field(default_factory=dict)
    projector: State = field(default_factory=dict)
    tower: State = field(default_factory=dict)
    newline: Lazy | None = None
    moe: dict[str, dict[str, Any]] = field(default_factory=dict)
    scales: tuple[int, ...] = (1,)


def split(state: State, raw: dict[str, Any], where: Path, text: Path) -> Parts:
    """Sorts the tensors of a whole model into its parts.

    Raises:
        CheckpointError: some belong to a part that cannot be imported.
    """
    parts = Parts(raw, str(where), text)
    for name, lazy in state.items():
        if _VIDEO.search(name):
            raise CheckpointError(f"{lazy.origin}: video towers and resamplers cannot be imported")
        if (tower := _TOWER.match(name)) is not None:
            parts.tower[tower[1]] = lazy
        elif (projector := _PROJECTOR.match(name)) is not None:
            parts.projector[projector[1]] = lazy
        elif name == _NEWLINE:
            parts.newline = lazy
        else:
            parts.decoder[name] = lazy
    return parts


def renamed(state: State, pattern: re.Pattern[str], new: Callable[[re.Match[str]], str]) -> State:
    """A state with other names where the pattern matches a whole name."""
    return {
        new(match) if (match := pattern.fullmatch(name)) is not None else name: lazy for name, lazy in state.items()
    }


def moe_part(layers: dict[int, int], k: int, convention: str) -> dict[str, Any]:
    """A section of our config for top-k routers.

    Args:
        layers: number of experts by layer.
    """
    indices, counts = sorted(layers), set(layers.values())
    return {
        "layers": indices,
        "num_experts": counts.pop() if len(counts) == 1 else [layers[index] for index in indices],
        "router": {"name": "top_k", "args": {"k": k, "convention": convention}},
    }
