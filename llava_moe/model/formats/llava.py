"""LLaVA's own layout (1.5, 1.6, LLaVA-NeXT): a whole model, a projector alone, or LoRA adapters.

Tensors: the decoder's under its usual names, `model.mm_projector.{0,2}.*`, `model.image_newline`, and
`model.vision_tower.vision_tower.*` only where the tower was trained. config.json is the decoder's with `mm_*` keys.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llava_moe.model.formats.lora import merge_lora
from llava_moe.model.formats.parts import Options, Parts, moe_part, renamed, split
from llava_moe.model.formats.tensors import NON_LORA_FILE, PROJECTOR_FILE, State, read_file, read_folder, read_json
from llava_moe.model.modeling import CheckpointError

_MIXTRAL = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.(gate|experts\.(\d+)\.(w[123]))\.weight")
_EXPERT_PARTS = {"w1": "gate", "w2": "down", "w3": "up"}
_FULL_PROJECTOR = re.compile(r"mm_projector\.")


def read_whole(path: Path, state: State, options: Options) -> Parts:
    """A whole model."""
    return split(state, read_json(path / "config.json"), path, path)


def read_projector(path: Path, options: Options) -> Parts:
    """`mm_projector.bin` and its config.json, onto the language model that the user names.

    Raises:
        CheckpointError: no base was named, or it is none.
    """
    base, raw = _base(path, options, "mm_projector.bin holds a projector alone"), _own_config(path, options)
    trained = read_file(path / PROJECTOR_FILE)
    if not any(_FULL_PROJECTOR.search(name) for name in trained):
        raise CheckpointError(f"{path / PROJECTOR_FILE}: no tensor of an mm_projector in it")
    return split({**base, **trained}, raw, path, _base_path(options))


def read_lora(path: Path, options: Options) -> Parts:
    """Adapters merged into the language model that the user names, and what was trained in full beside them.

    Raises:
        CheckpointError: no base was named, or something does not fit it.
    """
    base, raw = _base(path, options, "LoRA adapters need the model they were trained on"), _own_config(path, options)
    if not (path / NON_LORA_FILE).is_file():
        raise CheckpointError(f"{path}: {NON_LORA_FILE} is missing; without it the projector is not there")
    trained = {_plain(name): lazy for name, lazy in read_file(path / NON_LORA_FILE).items()}
    text = path if (path / "tokenizer_config.json").is_file() else _base_path(options)
    return split(merge_lora(path, {**base, **trained}), raw, path, text)


def _plain(name: str) -> str:
    """PEFT wraps the model once or twice."""
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith(("model.model.", "model.lm_head.")) else name


def _base_path(options: Options) -> Path:
    if options.base is None:
        raise CheckpointError("--base is not set")
    return options.base


def _base(path: Path, options: Options, why: str) -> State:
    if options.base is None:
        raise CheckpointError(f"{path}: {why}; name the language model with --base")
    state = read_folder(options.base) if options.base.is_dir() else {}
    if not state:
        raise CheckpointError(f"--base {options.base}: no model.safetensors, pytorch_model.bin or shards of them there")
    return state


def _own_config(path: Path, options: Options) -> dict[str, Any]:
    """The base's config with the keys that LLaVA added."""
    raw = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    return {**read_json(_base_path(options) / "config.json"), **raw}


def mixtral_experts(parts: Parts) -> None:
    """A Mixtral decoder becomes Mistral's with our layers: the same function, and its routings are seen."""
    counts: dict[int, int] = {}
    for name in parts.decoder:
        match = _MIXTRAL.fullmatch(name)
        if match is not None and match[3] is not None:
            counts[int(match[1])] = max(counts.get(int(match[1]), 0), int(match[3]) + 1)
    if not counts:
        return
    if parts.raw.get("num_experts_per_tok") is None:
        raise CheckpointError(f"{parts.where}: config.json has no num_experts_per_tok, and its decoder is a Mixtral")
    parts.decoder = renamed(parts.decoder, _MIXTRAL, _our_name)
    parts.moe["decoder"] = moe_part(counts, int(parts.raw["num_experts_per_tok"]), "softmax_topk_renorm")


def _our_name(match: re.Match[str]) -> str:
    block = f"model.layers.{match[1]}.mlp"
    return (
        f"{block}.router.scorer.weight"
        if match[3] is None
        else f"{block}.experts.{match[3]}.{_EXPERT_PARTS[match[4]]}.weight"
    )
