"""Which tensors on disk make up which parameter of a model, and models without weights to ask that of.

transformers renames tensors when it loads and saves (llava-hf's names are not those of the modules), and stores each
expert of a gated block under names of its own. Its mapping (llava_moe/_register.py) is asked for the names; the tensors
themselves go one by one through `llava_moe.model.streaming`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import no_init_weights

from llava_moe.model.families import build_model, is_ours, our_config
from llava_moe.model.foreign import ForeignConfigMixin, foreign_config, foreign_model_class, is_foreign
from llava_moe.model.modeling import CheckpointError, _refuse_partial
from llava_moe.model.streaming import CheckpointReader, TensorInfo

_HALVES = {"gate_proj": 0, "up_proj": 1, "down_proj": None, "w1": 0, "w3": 1, "w2": None}  # the latter: Mixtral
_EXPERT = re.compile(rf"\.experts\.(\d+)\.({'|'.join(_HALVES)})\.weight$")


@dataclass(frozen=True)
class Piece:
    """One tensor on disk, and which part of a parameter it is.

    Attributes:
        name: on disk.
        expert: index along the first dimension; None for all of it.
        half: 0 for the first half of the rows (the gate), 1 for the second; None for all rows.
    """

    name: str
    expert: int | None = None
    half: int | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The view of the parameter that this piece is."""
        view = parameter if self.expert is None else parameter[self.expert]
        return view if self.half is None else view.chunk(2)[self.half]


def _expert_piece(name: str) -> Piece:
    """Raises CheckpointError for a name that belongs to no expert."""
    match = _EXPERT.search(name)
    if match is None:
        raise CheckpointError(
            f"{name} is stored in a form that transformers converts when it loads the model and this program does not; "
            "load the checkpoint with transformers and save it once again"
        )
    return Piece(name, int(match[1]), _HALVES[match[2]])


def stock_pieces(model: Any, key: str, parameter: Tensor) -> tuple[Piece, ...]:
    """What a parameter becomes on disk when transformers saves the model in the original format.

    Args:
        parameter: that of this key; on the meta device it is enough.
    """
    model._weight_conversions = None  # what loading recorded depends on the files; the names are those of the class
    names = list(revert_weight_conversion(model, {key: parameter}))
    return (
        (Piece(names[0]),)
        if len(names) == 1 and _EXPERT.search(names[0]) is None
        else _ordered(_expert_piece(name) for name in names)
    )


def _ordered(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    return tuple(sorted(pieces, key=lambda piece: (piece.expert or 0, piece.half or 0)))


def read_config(path: Path) -> Any:
    """The config of a checkpoint; that of a stock image-text-to-text one becomes ours."""
    kind = json.loads((path / "config.json").read_text()).get("model_type")
    config = AutoConfig.from_pretrained(path)
    return foreign_config(config) if is_foreign(kind) else our_config(config)


def empty_model(config: Any) -> Any:
    """A float32 model in evaluation mode whose parameters are on the meta device; its buffers are real."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        if is_ours(config):
            model: Any = build_model(config)
        elif isinstance(config, ForeignConfigMixin):
            model = foreign_model_class(config)(config)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # putting each parameter on the meta device has parted those that are one
    return model.eval()


class StoredModel:
    """A checkpoint directory and the empty model of its config: parameters are read by their names in the model.

    Attributes:
        pieces: the tensors on disk of each parameter and persistent buffer that has any.
        keys: the parameter that each tensor on disk belongs to.
        strays: tensors on disk that the model has no place for, such as a tower's pooling head.

    Raises:
        CheckpointError: tensors are missing, or have another shape than the config asks for.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self.model = empty_model(self.config)
        self.reader = CheckpointReader(self.path)
        self.state: dict[str, Tensor] = self.model.state_dict()
        self.pieces: dict[str, tuple[Piece, ...]] = {}
        self.keys: dict[str, str] = {}
        self.strays: list[str] = []
        self._map()
        self._check()

    def _map(self) -> None:
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        found: dict[str, list[Piece]] = {}
        for name in self.reader.infos:
            key, pattern = rename_source_key(name, renamings, converters, self.model.base_model_prefix, self.state)
            if key not in self.state and name in self.state:
                key, pattern = name, None
            if key not in self.state:
                self.strays.append(name)
                continue
            found.setdefault(key, []).append(Piece(name) if pattern is None else _expert_piece(name))
            self.keys[name] = key
        self.pieces = {key: _ordered(pieces) for key, pieces in found.items()}

    def _check(self) -> None:
        ignored = self.model._keys_to_ignore_on_load_missing or ()
        missing = [
            key
            for key in self.state
            if key not in self.pieces
            and not any(other in self.pieces for other in self._tied(key))
            and not any(re.search(pattern, key) for pattern in ignored)
        ]
        mismatched = [wrong for key in self.pieces if (wrong := self._mismatch(key)) is not None]
        old_buffers = re.compile(r"rotary_emb\.inv_freq$")  # transformers leaves these out too
        unexpected = [name for name in self.strays if old_buffers.search(name) is None]
        _refuse_partial(
            str(self.path), {"missing_keys": missing, "mismatched_keys": mismatched, "unexpected_keys": unexpected}
        )

    def _tied(self, key: str) -> list[str]:
        """The other names of the same parameter."""
        tied: dict[str, str] = self.model.all_tied_weights_keys
        return [tied[key]] if key in tied else [target for target, source in tied.items() if source == key]

    def _mismatch(self, key: str) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
        pieces, wanted = self.pieces[key], tuple(self.state[key].shape)
        found = self.reader.infos[pieces[0].name].shape
        experts = {piece.expert for piece in pieces} - {None}
        if not experts:
            return None if found == wanted else (key, found, wanted)
        halves = len({piece.half for piece in pieces})
        stacked = (len(experts), found[0] * halves, *found[1:])
        return None if stacked == wanted and len(pieces) == len(experts) * halves else (key, stacked, wanted)

    def located(self, key: str) -> tuple[Piece, ...]:
        """The tensors on disk of a parameter, which may be stored under the name of one that it is tied to."""
        return next(self.pieces[name] for name in (key, *self._tied(key)) if name in self.pieces)

    def info(self, key: str) -> TensorInfo:
        """Dtype and shape of a parameter; the dtype is that on disk."""
        return TensorInfo(self.reader.infos[self.located(key)[0].name].dtype, tuple(self.state[key].shape))

    def read(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """One parameter, in the dtype that it has on disk or in another."""
        pieces, info = self.located(key), self.info(key)
        if len(pieces) == 1 and pieces[0].expert is None:
            return self.reader.read(pieces[0].name).to(dtype or info.dtype)
        parameter = torch.empty(info.shape, dtype=dtype or info.dtype)
        for piece in pieces:
            piece.of(parameter).copy_(self.reader.read(piece.name))
        return parameter

    def name_of(self, module: nn.Module) -> str:
        """The path of a module inside the model."""
        return next(name for name, child in self.model.named_modules() if child is module)
