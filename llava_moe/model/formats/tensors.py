"""Weights of any layout: names, and tensors that are read one by one when they are asked for.

Safetensors files are read through `llava_moe.model.streaming`. Pickled files are opened with `weights_only=True`, which
executes nothing that is in them, and mapped where their kind allows it.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_moe.model.modeling import CheckpointError
from llava_moe.model.streaming import CheckpointReader, TensorInfo


@dataclass(frozen=True)
class Lazy:
    """A tensor that is not read yet.

    Attributes:
        info: its dtype and shape.
        origin: file and key, for messages.
        load: reads it.
    """

    info: TensorInfo
    origin: str
    load: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor, origin: str) -> Lazy:
        """One that is in memory already."""
        return Lazy(TensorInfo.of(tensor), origin, lambda: tensor)


State = dict[str, Lazy]
_WHOLE = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
# What torch's unpickler raises for damaged files, besides what it refuses.
_DAMAGED = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    zipfile.BadZipFile,
)
PROJECTOR_FILE, NON_LORA_FILE, TOWER_FILE = "mm_projector.bin", "non_lora_trainables.bin", "clip.bin"


class _OneFile(CheckpointReader):
    """The reader of streaming.py for one file of any name."""

    def __init__(self, file: Path) -> None:
        self.path = file
        self.infos: dict[str, TensorInfo] = {}
        self.file_sizes: list[int] = []
        self._places = {}
        self._read_header(file)


def read_file(file: Path) -> State:
    """The tensors of one *.safetensors or pickled file.

    Raises:
        CheckpointError: the file is missing, damaged, or holds other things than tensors.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    if file.suffix == ".safetensors":
        reader = _OneFile(file)
        return {name: Lazy(info, f"{file}: {name}", partial(reader.read, name)) for name, info in reader.infos.items()}
    return {name: Lazy.of(tensor, f"{file}: {name}") for name, tensor in _unpickled(file).items()}


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except _DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file}: damaged, cut short, or more than tensors ({reason}); copy it again, or convert it to safetensors "
            "on a machine that may trust it"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds a {type(found).__name__}, not tensors by name")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: {name} is a {type(value).__name__}, not a tensor")
    return {str(name): value.detach() for name, value in found.items()}


def read_folder(folder: Path) -> State:
    """The tensors of a model directory: one file or shards, safetensors or pickled; empty where it has no weights.

    Raises:
        CheckpointError: a shard is missing or damaged, or does not hold what the index promises.
    """
    for name in _WHOLE:
        if (folder / name).is_file():
            return read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index)
    shards = sorted(file.name for file in folder.iterdir() if _SHARD.fullmatch(file.name))
    if shards:
        kind = _WHOLE[0] if shards[0].endswith("safetensors") else _WHOLE[1]
        raise CheckpointError(
            f"{folder}: {kind}.index.json is missing, which says what is in {shards[0]} and {len(shards) - 1} more; "
            "copy it too"
        )
    return {}


def _read_shards(index: Path) -> State:
    places: dict[str, str] = read_json(index).get("weight_map", {})
    files = sorted(set(places.values()))
    absent = [name for name in files if not (index.parent / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{index.parent}: {absent[0]} is missing ({len(absent)} of {len(files)} shards); copy it again"
        )
    state: State = {}
    for name in files:
        state.update(read_file(index.parent / name))
    missing = [key for key in places if key not in state]
    if missing:
        raise CheckpointError(
            f"{index.parent / places[missing[0]]}: {missing[0]} is not in it, but {index.name} says so; copy both again"
        )
    return state


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing or something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file; name the directory of one checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds a {type(found).__name__}, not a JSON object")
    return found
