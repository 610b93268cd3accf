"""LoRA adapters (2106.09685) merged into the weights that they belong to: W + (alpha / r) B A, in float32.

alpha / sqrt(r) in the place of alpha / r where the adapter says `use_rslora` (2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_moe.model.formats.tensors import ADAPTER_FILES, Lazy, State, read_file, read_json
from llava_moe.model.modeling import CheckpointError

_KEY = re.compile(r"^base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight$")
# Options that change what the adapters mean; one that is absent or empty is harmless.
_REFUSED = ("use_dora", "alpha_pattern", "fan_in_fan_out", "modules_to_save", "megatron_config")


def merge_lora(folder: Path, base: State) -> State:
    """The tensors of `base` with the adapters of a directory merged in; the others are handed through.

    Raises:
        CheckpointError: an adapter has no counterpart, another shape, or an option that is not understood.
    """
    options = read_json(folder / "adapter_config.json")
    refused = [key for key in _REFUSED if options.get(key)]
    if refused or options.get("bias", "none") != "none":
        name = refused[0] if refused else "bias"
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: {name}={options[name]!r} cannot be merged here; merge it with peft and "
            "import the whole model"
        )
    found = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder}: neither {' nor '.join(ADAPTER_FILES)} is there")
    merged = dict(base)
    for module, pair in _pairs(read_file(found[0])).items():
        name = f"{module}.weight"
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{next(iter(pair.values())).origin}: its other half is missing")
        if name not in base:
            raise CheckpointError(f"{pair['A'].origin}: the base has no {name} to merge it into")
        merged[name] = _merged(base[name], pair["A"], pair["B"], options)
    return merged


def _pairs(adapters: State) -> dict[str, dict[str, Lazy]]:
    pairs: dict[str, dict[str, Lazy]] = {}
    for name, lazy in adapters.items():
        match = _KEY.match(name)
        if match is None:
            raise CheckpointError(f"{lazy.origin}: no LoRA adapter of a linear map, and cannot be merged")
        pairs.setdefault(match[1], {})[match[2]] = lazy
    return pairs


def _merged(weight: Lazy, first: Lazy, second: Lazy, options: dict[str, Any]) -> Lazy:
    (rank, fan_in), (fan_out, rank_again) = first.info.shape, second.info.shape
    if (fan_out, fan_in) != weight.info.shape or rank != rank_again:
        raise CheckpointError(
            f"{first.origin}: A {first.info.shape} and B {second.info.shape} do not fit {weight.origin}, which is "
            f"{weight.info.shape}; is this the base it was trained on?"
        )
    scale = options["lora_alpha"] / (math.sqrt(rank) if options.get("use_rslora") else rank)

    def load() -> Tensor:
        update = second.load().float() @ first.load().float()
        return (weight.load().float() + scale * update).to(weight.info.dtype)

    reader: Callable[[], Tensor] = load
    return Lazy(weight.info, f"{weight.origin} + {first.origin}", reader)
