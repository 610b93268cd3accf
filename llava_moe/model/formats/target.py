"""Tensors found elsewhere, written as a checkpoint of ours: each parameter must be there, and nothing is left over.

The tensors come under the names that parameters have in the model, except for experts: expert e of a layer's block is
`<block>.experts.<e>.<gate|up|down>.<weight|bias>`, and becomes part of the stacked parameter or a tensor of its own,
whichever our files have. Shared experts are one block, `<block>.shared.block.0.<gate|up|down>.<weight|bias>`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llava_moe.model.configuration import LlavaMoeConfig
from llava_moe.model.formats.tensors import Lazy, State
from llava_moe.model.layout import Piece, empty_model, stock_pieces
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.streaming import MAX_SHARD_BYTES, CheckpointWriter, TensorInfo, check_space

_STACKED = re.compile(r"^(.+\.(?:experts|shared\.block))\.(gate_up|up|down)_(proj|bias)$")
_HALVES = {"gate_up": ("gate", "up"), "up": ("up",), "down": ("down",)}
# What old files hold and no model needs: buffers that are computed, and parts of a tower behind the features.
_NEEDLESS = re.compile(
    r"rotary_emb\.inv_freq$|position_ids$|vision_tower\.(tower\.)?(vision_model\.)?(head\.|post_layernorm\.)|masked_bias$"
)


@dataclass
class Placed:
    """What will be written.

    Attributes:
        sources: by names on disk.
        left_out: tensors of the source that no model needs.
    """

    sources: dict[str, Lazy] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def place(config: LlavaMoeConfig, state: State, where: str) -> Placed:
    """Finds a tensor for every parameter of the model of a config.

    Raises:
        CheckpointError: one is missing, left over, or of another shape than the config asks for.
    """
    model = empty_model(config)
    wanted: dict[str, Tensor] = model.state_dict()
    tied: dict[str, str] = model.all_tied_weights_keys
    used: set[str] = set()
    placed = Placed()
    for key, parameter in wanted.items():
        if key in tied:
            # written once, under the name that it is tied to; a second copy of the same numbers may lie beside it
            used.add(key)
            continue
        for piece in stock_pieces(model, key, parameter):
            names, shape = _names(key, piece, parameter, state), tuple(piece.of(parameter).shape)
            missing = [name for name in names if name not in state]
            if missing:
                raise CheckpointError(f"{where}: no tensor for {missing[0]}{_near(missing[0], state)}")
            placed.sources[piece.name] = _joined([state[name] for name in names], shape, names[0], key)
            used.update(names)
    stray = [name for name in state if name not in used]
    placed.left_out = [state[name].origin for name in stray if _NEEDLESS.search(name)]
    stray = [name for name in stray if not _NEEDLESS.search(name)]
    if stray:
        rest = f" and {len(stray) - 1} more" if len(stray) > 1 else ""
        raise CheckpointError(f"{state[stray[0]].origin}: has no place in the model that config.json describes{rest}")
    return placed


def _near(name: str, state: State) -> str:
    """What lies beside a missing tensor, if anything."""
    folder = name.rpartition(".")[0]
    beside = [state[other].origin for other in state if other.startswith(f"{folder}.")]
    return f"; found beside it: {beside[0]}" if beside else ""


def _names(key: str, piece: Piece, parameter: Tensor, state: State) -> list[str]:
    """The tensors of the source that a piece is made of, in the order of its rows."""
    stacked = _STACKED.match(key)
    if stacked is None:
        return [_tower_name(key, state)]
    block, part, kind = stacked[1], stacked[2], "weight" if stacked[3] == "proj" else "bias"
    experts: Sequence[int] = range(parameter.shape[0]) if piece.expert is None else [piece.expert]
    halves = _HALVES[part] if piece.half is None else (_HALVES[part][piece.half],)
    return [_tower_name(f"{block}.{expert}.{half}.{kind}", state) for expert in experts for half in halves]


def _tower_name(key: str, state: State) -> str:
    """transformers has taken `vision_model` out of its towers' names; files have it or not."""
    if key in state:
        return key
    for head in ("model.vision_tower.tower.", "model.vision_tower."):
        if key.startswith(head):
            rest = key.removeprefix(head)
            bare = rest.removeprefix("vision_model.")
            other = head + (bare if bare != rest else f"vision_model.{rest}")
            return other if other in state else key
    return key


def _joined(parts: list[Lazy], shape: tuple[int, ...], name: str, key: str) -> Lazy:
    """One tensor of several, one after another along the rows; or the only one as it is."""
    first = parts[0]
    load: Callable[[], Tensor] = first.load
    fits = len(parts) == 1 and first.info.shape == shape
    if not fits and _STACKED.match(key) is not None:
        columns = first.info.shape[1:]
        rows = sum(part.info.shape[0] for part in parts)
        fits = columns == shape[len(shape) - len(columns) :] and rows * math.prod(columns) == math.prod(shape)
        fits = fits and all(part.info.shape[1:] == columns for part in parts)
        load = partial(_stack, parts, shape)
    if not fits:
        raise CheckpointError(f"{first.origin}: is {first.info.shape}, but {key} ({name}) wants {shape}")
    return Lazy(TensorInfo(first.info.dtype, shape), first.origin, load)


def _stack(parts: list[Lazy], shape: tuple[int, ...]) -> Tensor:
    return torch.cat([part.load() for part in parts]).reshape(shape)


def write(placed: Placed, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes all tensors, one at a time.

    Raises:
        CheckpointError: the disk is full, or a source cannot be read.
    """
    infos = {name: lazy.info for name, lazy in placed.sources.items()}
    check_space(folder, sum(info.nbytes for info in infos.values()))
    with CheckpointWriter(folder, infos, max_shard_bytes) as writer:
        for name, lazy in placed.sources.items():
            writer.write(name, lazy.load())
