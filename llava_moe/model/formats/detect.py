"""Which layout a directory has, from the files in it and the names of the tensors, never from the directory's name.

Published checkpoints are renamed, and some have their `model_type` edited so that a serving engine takes them, so
neither is trusted: the keys of the weights decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from llava_moe.model.formats.tensors import ADAPTER_FILES, NON_LORA_FILE, PROJECTOR_FILE, State, read_folder, read_json
from llava_moe.model.modeling import CheckpointError

LAYOUTS = {
    "llava": "LLaVA 1.5 / LLaVA-NeXT, a whole model",
    "llava_projector": "LLaVA stage 1: mm_projector.bin, to be put onto a language model",
    "llava_lora": "LLaVA LoRA: adapters and non_lora_trainables.bin, to be merged into a language model",
    "llava_hf": "the LLaVA class of transformers",
    "moe_llava": "MoE-LLaVA: experts under DeepSpeed's names",
    "cumo": "CuMo: experts in the projector, the tower or a Mixtral decoder",
}
# First match wins: the special kinds also have the names of the general one.
_BY_NAME = (
    ("moe_llava", re.compile(r"\.deepspeed_moe\.")),
    ("cumo", re.compile(r"mm_projector\.experts\.|vision_tower\.vision_model\.")),
    ("llava", re.compile(r"(^|\.)mm_projector\.")),
    ("llava_hf", re.compile(r"(^|\.)multi_modal_projector\.")),
)
# A tower that LLaVA saved is wrapped twice, CuMo's own once.
_WRAPPED = re.compile(r"vision_tower\.vision_tower\.|(^|\.)multi_modal_projector\.")


def detect(path: Path) -> tuple[str, State]:
    """The name of the layout (a key of `LAYOUTS`), and the tensors of the directory's model files.

    Raises:
        CheckpointError: the directory does not exist, is damaged, or is of no layout that is known.
    """
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; name the directory that it is in")
    if not path.is_dir():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None
        hint = f"; a model of the hub is fetched first: hf download {path} --local-dir DIRECTORY" if hub else ""
        raise CheckpointError(f"{path}: no such checkpoint directory{hint}")
    if (path / NON_LORA_FILE).is_file() or any((path / name).is_file() for name in ADAPTER_FILES):
        return "llava_lora", {}
    if not (path / "config.json").is_file() and not (path / PROJECTOR_FILE).is_file():
        found = ", ".join(sorted(file.name for file in path.iterdir())[:6]) or "nothing"
        raise CheckpointError(f"{path}: no config.json there (found {found}); name the directory of one checkpoint")
    state = read_folder(path)
    if not state:
        if (path / PROJECTOR_FILE).is_file():
            return "llava_projector", {}
        raise CheckpointError(
            f"{path}: no weights there (model.safetensors, pytorch_model.bin, their shards, adapter_model.*, or "
            f"{PROJECTOR_FILE})"
        )
    return by_names(path, state), state


def by_names(path: Path, names: Iterable[str]) -> str:
    """The layout that tensors of these names have.

    Raises:
        CheckpointError: none that is known.
    """
    names = list(names)
    wrapped = any(_WRAPPED.search(name) for name in names)
    for layout, pattern in _BY_NAME:
        found = [name for name in names if pattern.search(name)]
        if layout == "cumo" and wrapped:
            found = [name for name in found if "mm_projector.experts." in name]
        if found:
            return layout
    kind = read_json(path / "config.json").get("model_type")
    raise CheckpointError(
        f"{path}: no layout that can be imported: model_type is {kind!r}, and none of its {len(names)} tensors is of a "
        f"projector (the first are {', '.join(names[:3])}). Known: {'; '.join(LAYOUTS.values())}"
    )
