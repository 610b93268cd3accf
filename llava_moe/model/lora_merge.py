"""An adapter directory and its base become one whole checkpoint, tensor by tensor.

    merged = base + s B A        s = alpha / rank, or alpha / sqrt(rank) with rslora (2312.03732)

computed in float32 and rounded once, to the dtype that the run had its model in. Stacked experts have a pair (A, B) for
each expert; peft keeps the A of all experts in one matrix (E R, I) and the B in another (O, R E), expert last.

    adapter_config.json, adapter_model.safetensors    as peft reads them
    trained.safetensors                               what learned whole beside them, and the buffers
    lora.json                                         the base, its fingerprint, which adapter is for which weight
    config.json, processor files                      those of the result

A run writes its final model with this function too, so `llava-moe merge` gives the same bits.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_moe.model.assemble import ADAPTER_CONFIG, check_checkpoint, fingerprint, whole_directory
from llava_moe.model.formats.tensors import State, read_file
from llava_moe.model.layout import Piece, StoredModel, stock_pieces
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.streaming import MAX_SHARD_BYTES, CheckpointWriter, TensorInfo, check_space

FACTS, ADAPTERS, TRAINED = "lora.json", "adapter_model.safetensors", "trained.safetensors"
_PREFIX = "base_model.model."  # peft's, in front of every name
_OWN = (FACTS, ADAPTERS, TRAINED, ADAPTER_CONFIG, "README.md")


@dataclass(frozen=True)
class Adapter:
    """An adapter directory; its tensors are read when they are asked for.

    Attributes:
        facts: lora.json.
        pairs: the adapters, by their names in the file.
        trained: what replaces a tensor of the base, by its name in the model.
    """

    folder: Path
    facts: dict[str, Any]
    pairs: State
    trained: State

    @property
    def scale(self) -> float:
        """s at the head of this file."""
        return adapter_scale(self.facts["rank"], self.facts["alpha"], self.facts["rslora"])

    def pair(self, parameter: str) -> tuple[Tensor, Tensor] | None:
        """A and B of a parameter of the base, or None.

        Raises:
            CheckpointError: the adapters are not in the file.
        """
        place = self.facts["adapted"].get(parameter)
        if place is None:
            return None
        names = [f"{_PREFIX}{place}.lora_{half}.weight" for half in "AB"]
        absent = [name for name in names if name not in self.pairs]
        if absent:
            raise CheckpointError(f"{self.folder / ADAPTERS}: {absent[0]} is missing; copy the directory again")
        first, second = (self.pairs[name].load() for name in names)
        return first, second


def adapter_scale(rank: int, alpha: float, rslora: bool) -> float:
    """What the product of an adapter's matrices is multiplied by."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def read_adapter(folder: Path) -> Adapter:
    """Opens what a run wrote to `<output_dir>/adapter`.

    Raises:
        CheckpointError: it is no such directory, or a file of it is missing or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such adapter directory")
    absent = [
        name for name in (ADAPTER_CONFIG, ADAPTERS, TRAINED, FACTS, "config.json") if not (folder / name).is_file()
    ]
    if absent:
        hint = "; LoRA checkpoints of LLaVA's own program come in by `llava-moe import`" if FACTS in absent else ""
        raise CheckpointError(f"{folder}: {', '.join(absent)} is missing, so it is no adapter of this program{hint}")
    try:
        facts = json.loads((folder / FACTS).read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / FACTS}: not valid JSON: {error}") from error
    return Adapter(folder, facts, read_file(folder / ADAPTERS), read_file(folder / TRAINED))


def merge_weight(weight: Tensor, first: Tensor, second: Tensor, scale: float, transposed: bool = False) -> Tensor:
    """The weight with its adapter, in the weight's dtype.

    Args:
        weight: (O, I), or (E, O, I); (E, I, O) where `transposed`.
        first, second: A (R, I) and B (O, R), or (E R, I) and (O, R E).

    Raises:
        ValueError: the shapes do not fit.
    """
    experts = weight.shape[0] if weight.ndim == 3 else 1
    out, inner = (weight.shape[-1], weight.shape[-2]) if transposed else (weight.shape[-2], weight.shape[-1])
    if first.shape[1] != inner or second.shape[0] != out or first.shape[0] != second.shape[1]:
        raise ValueError(f"A {tuple(first.shape)} and B {tuple(second.shape)} do not fit {tuple(weight.shape)}")
    a_ERI = first.float().reshape(experts, -1, inner)
    b_ORE = second.float().reshape(out, -1, experts)
    merged = torch.empty_like(weight)
    stacked = (experts, *weight.shape[-2:])
    for expert, (old, new) in enumerate(zip(weight.view(stacked), merged.view(stacked), strict=True)):
        delta = scale * (b_ORE[:, :, expert] @ a_ERI[expert])
        new.copy_(old.float() + (delta.T if transposed else delta))
    return merged


def merge_adapter(
    folder: str | Path,
    base: str | Path | None,
    out: Path,
    finish: Callable[[Path, dict[str, Any]], object] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the whole checkpoint and returns the facts of the adapter.

    Args:
        folder: `<output_dir>/adapter` of a run, wherever it lies now.
        base: the checkpoint that it was trained on; None takes the place that the run found it at.
        out: the directory to write; it appears when it is complete.
        max_shard_bytes: a file of weights is at most this large.
        finish: called with the finished directory and the facts, before the directory takes its name.

    Raises:
        CheckpointError: the directory is no adapter of ours, the base is another one than it was trained on, or the
            disk is full; nothing is left then.
    """
    adapter = read_adapter(Path(folder))
    stored = StoredModel(_checked_base(adapter, base))
    plan = list(_plan(adapter, stored))
    infos = {piece.name: info for _, pieces in plan for piece, info in pieces}
    check_space(out, sum(info.nbytes for info in infos.values()))
    with whole_directory(out) as partial:
        for file in sorted(adapter.folder.iterdir()):
            if file.is_file() and file.name not in _OWN:
                shutil.copyfile(file, partial / file.name)
        with CheckpointWriter(partial, infos, max_shard_bytes) as writer:
            for key, pieces in plan:
                tensor = _merged(adapter, stored, key)
                for piece, info in pieces:
                    writer.write(piece.name, piece.of(tensor).to(info.dtype))
        if finish is not None:
            finish(partial, adapter.facts)
    return adapter.facts


def _checked_base(adapter: Adapter, base: str | Path | None) -> Path:
    """Raises CheckpointError for a base that is not there, or is not the one of the adapter."""
    place = Path(adapter.facts["base"] if base is None else base)
    if base is None and not place.is_dir():
        raise CheckpointError(
            f"{adapter.folder}: was trained on {place}, which is not there; name the place of that checkpoint with "
            "--base"
        )
    check_checkpoint(place)
    if fingerprint(place) != adapter.facts["base_fingerprint"]:
        raise CheckpointError(
            f"{place}: not the checkpoint that the adapter in {adapter.folder} was trained on "
            f"({adapter.facts['base']}, or it has changed since); merged into another base it means nothing"
        )
    return place


def _plan(adapter: Adapter, stored: StoredModel) -> Iterator[tuple[str, list[tuple[Piece, TensorInfo]]]]:
    """For each tensor of the base its name in the model, and what is written of it.

    Raises:
        CheckpointError: the adapter is for weights that this model does not have.
    """
    strays = [key for key in (*adapter.facts["adapted"], *adapter.trained) if key not in stored.state]
    if strays:
        raise CheckpointError(f"{adapter.folder}: has {strays[0]}, which {stored.path} does not have")
    parameters = {name for name, _ in stored.model.named_parameters(remove_duplicate=False)}
    for key in stored.pieces:
        dtype = stored.info(key).dtype
        if key in parameters and dtype.is_floating_point:
            dtype = getattr(torch, adapter.facts["dtypes"].get(key, adapter.facts["dtype"]))
        replaced = _replacement(adapter, stored, key)
        dtype = dtype if replaced is None else adapter.trained[replaced].info.dtype
        meta = torch.empty(tuple(stored.state[key].shape), dtype=dtype, device="meta")
        yield key, [(piece, TensorInfo.of(piece.of(meta))) for piece in stock_pieces(stored.model, key, meta)]


def _replacement(adapter: Adapter, stored: StoredModel, key: str) -> str | None:
    """The name under which the run saved this tensor, which may be that of one it is tied to."""
    return next((name for name in (key, *stored._tied(key)) if name in adapter.trained), None)


def _merged(adapter: Adapter, stored: StoredModel, key: str) -> Tensor:
    replaced = _replacement(adapter, stored, key)
    if replaced is not None:
        tensor = adapter.trained[replaced].load()
        if tensor.shape != stored.state[key].shape:
            raise CheckpointError(
                f"{adapter.folder / TRAINED}: {key} is {tuple(tensor.shape)}, the base has "
                f"{tuple(stored.state[key].shape)}"
            )
        return tensor
    pair = adapter.pair(key)
    # As the run had it: what the adapter was trained on is the rounded weight.
    dtype = getattr(torch, adapter.facts["dtypes"].get(key, adapter.facts["dtype"]))
    if pair is None:
        return stored.read(key)
    transposed = bool(getattr(stored.model.get_submodule(key.rpartition(".")[0]), "is_transposed", False))
    try:
        return merge_weight(stored.read(key, dtype), *pair, adapter.scale, transposed)
    except ValueError as error:
        raise CheckpointError(f"{adapter.folder / ADAPTERS}: {key}: {error}") from error
