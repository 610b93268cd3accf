"""A checkpoint of ours out, as one of transformers' own classes: readable without this project, and served by engines.

A dense model becomes the stock class of its family as it is. One with experts becomes the same class around a decoder
that transformers has with experts:

    Llama, Mistral  -> mixtral      every layer sparse, weights of the chosen experts sum to 1
    Qwen2           -> qwen2_moe    any layers; weights with or without that; gated shared experts
    Qwen3           -> qwen3_moe    any layers; weights with or without that

All else is refused by name (`export_rules`). Tensors get the names of published llava-hf files, which serving engines
map from: `vision_tower.vision_model.*`, `language_model.model.*`, and each expert by itself.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llava_moe.model.assemble import check_checkpoint
from llava_moe.model.configuration import MoePart
from llava_moe.model.formats.export_rules import STOCK, check_decoder, check_outside, check_router, target_of
from llava_moe.model.layout import Piece, StoredModel
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.native import NATIVE_FAMILIES
from llava_moe.model.streaming import MAX_SHARD_BYTES, CheckpointWriter, TensorInfo, check_space

_WRAPPED_TOWERS = ("clip_vision_model", "siglip_vision_model")
_OWN_KEYS = ("model_type", "architectures", "transformers_version")


@dataclass(frozen=True)
class ExportPlan:
    """What will be written.

    Attributes:
        target: the model_type of the decoder.
        pieces: for each name on disk, the parameter of ours and which part of it.
        zeros: tensors that the class has, that we have not, and that must do nothing.
        notes: what the stock class does in another way, in one line each.
    """

    stored: StoredModel
    config: Any
    target: str
    pieces: dict[str, tuple[str, Piece]]
    zeros: dict[str, TensorInfo]
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Dtype and shape of every tensor to write."""
        found = {}
        for name, (key, piece) in self.pieces.items():
            shape = tuple(piece.of(self.stored.state[key]).shape)
            found[name] = TensorInfo(self.stored.info(key).dtype, shape)
        return found | self.zeros


def plan_export(path: Path) -> ExportPlan:
    """Decides the target and every name.

    Raises:
        CheckpointError: no class of transformers computes what this checkpoint does; the message says why.
    """
    stored = StoredModel(check_checkpoint(path))
    config = stored.config
    if config.model_type not in STOCK:
        raise CheckpointError(
            f"{path}: a model of type {config.model_type!r} has no counterpart in transformers that this program "
            f"knows; known: {', '.join(STOCK)}"
        )
    section = config.moe_section
    parts = {} if section is None else section.parts()
    notes = check_outside(path, config, list(parts))
    text: Any = config.text_config
    blocks: list[str] = []
    if "decoder" in parts:
        text = _moe_text(path, stored, parts["decoder"])
        blocks = [f"model.language_model.layers.{index}.mlp." for index in parts["decoder"].layers]
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]  # what vLLM builds the decoder by
    stock = _stock_config(stored, text)
    pieces, zeros = _pieces(path, stored, text.model_type, blocks)
    return ExportPlan(stored, stock, text.model_type, pieces, zeros, list(notes))


def _stock_config(stored: StoredModel, text: Any) -> Any:
    config = stored.config
    config_class, model_class = STOCK[config.model_type]
    ours_alone = {field.name for field in dataclasses.fields(type(config))}
    ours_alone -= {field.name for field in dataclasses.fields(config_class)}
    drop = {*_OWN_KEYS, *ours_alone}
    values = {key: value for key, value in config.to_dict().items() if key not in drop}
    stock = config_class(**{**values, "text_config": text, "vision_config": config.vision_config})
    stock.architectures = [model_class.__name__]
    embedding = "model.language_model.embed_tokens.weight"
    stock.dtype = str(stored.info(embedding).dtype).removeprefix("torch.")
    return stock


def _moe_text(path: Path, stored: StoredModel, part: MoePart) -> PretrainedConfig:
    """The config of the sparse decoder in the place of our dense one with a section."""
    text: Any = stored.config.text_config
    target = target_of(path, text)
    k, renormalised = check_router(path, part)
    check_decoder(path, text, target, part, renormalised)
    block = f"model.language_model.layers.{part.layers[0]}.mlp."
    width = stored.state[f"{block}experts.down_proj"].shape[-1]
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[target])} | {"head_dim"}
    drop = {"architectures", "model_type", "transformers_version", "layer_types"}
    values = {key: value for key, value in text.to_dict().items() if key in known - drop}
    values |= {"num_experts_per_tok": k, "output_router_logits": False}
    if target == "mixtral":
        values |= {"num_local_experts": part.num_experts[0], "intermediate_size": width}
    else:
        dense = [index for index in range(text.num_hidden_layers) if index not in part.layers]
        values |= {"num_experts": part.num_experts[0], "moe_intermediate_size": width, "mlp_only_layers": dense}
        values |= {"decoder_sparse_step": 1, "norm_topk_prob": renormalised}
    if target == "qwen2_moe":
        shared = stored.state.get(f"{block}shared.block.down_proj")
        values["shared_expert_intermediate_size"] = 0 if shared is None else shared.shape[-1]
    return CONFIG_MAPPING[target](**values)


def _pieces(
    path: Path, stored: StoredModel, target: str, blocks: list[str]
) -> tuple[dict[str, tuple[str, Piece]], dict[str, TensorInfo]]:
    pieces: dict[str, tuple[str, Piece]] = {}
    zeros: dict[str, TensorInfo] = {}
    tied = stored.model.all_tied_weights_keys
    tower = stored.config.vision_config.model_type
    native = not blocks and target in NATIVE_FAMILIES
    for key, parameter in stored.state.items():
        if key in tied:
            continue
        head, middle, inner = key.partition(".mlp.")
        if native and middle and head.startswith("model.language_model."):
            for name, piece in _native_names(inner, parameter, target):
                pieces[_stock_name(f"{head}.mlp.", tower, target) + name] = (key, piece)
            continue
        block = next((block for block in blocks if key.startswith(block)), None)
        if block is None:
            pieces[_stock_name(key, tower)] = (key, Piece(key))
            continue
        inner = key.removeprefix(block)
        for name, piece in _expert_names(path, inner, parameter, target):
            pieces[_stock_name(block, tower, target) + name] = (key, piece)
        if inner == "experts.down_proj" and target == "qwen2_moe" and f"{block}shared.gate" not in stored.state:
            info = TensorInfo(stored.info(key).dtype, (1, parameter.shape[1]))
            zeros[f"{_stock_name(block, tower)}shared_expert_gate.weight"] = info
    return pieces, zeros


def _stock_name(key: str, tower: str, target: str = "") -> str:
    """A parameter's name in published files."""
    if key.startswith("lm_head."):
        return f"language_model.{key}"
    key = key.removeprefix("model.")
    if key.startswith("language_model."):
        name = f"language_model.model.{key.removeprefix('language_model.')}"
        return name.replace(".mlp.", ".block_sparse_moe.") if target == "mixtral" else name
    if key.startswith("vision_tower.") and tower in _WRAPPED_TOWERS:
        return f"vision_tower.vision_model.{key.removeprefix('vision_tower.').removeprefix('vision_model.')}"
    return key


def _expert_names(path: Path, inner: str, parameter: Tensor, target: str) -> list[tuple[str, Piece]]:
    """What one parameter of an MoE layer of ours becomes, by names inside the layer."""
    gate, up, down = ("w1", "w3", "w2") if target == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    if inner == "router.scorer.weight":
        return [("gate.weight", Piece(inner))]
    if inner in ("experts.gate_up_proj", "experts.down_proj"):
        return _stacked_names(inner, parameter, target)
    if inner == "shared.gate":
        return [("shared_expert_gate.weight", Piece(inner))]
    if inner == "shared.block.gate_up_proj":
        return [(f"shared_expert.{name}.weight", Piece(inner, 0, half)) for half, name in enumerate((gate, up))]
    if inner == "shared.block.down_proj":
        return [(f"shared_expert.{down}.weight", Piece(inner, 0))]
    raise CheckpointError(f"{path}: {inner} of its MoE layers has no place in a {target} decoder")


def _native_names(inner: str, parameter: Tensor, target: str) -> list[tuple[str, Piece]]:
    """The same for a layer of transformers' own, whose names stay but for the experts, which are stacked in memory."""
    stacked = inner in ("experts.gate_up_proj", "experts.down_proj")
    return _stacked_names(inner, parameter, target) if stacked else [(inner, Piece(inner))]


def _stacked_names(inner: str, parameter: Tensor, target: str) -> list[tuple[str, Piece]]:
    gate, up, down = ("w1", "w3", "w2") if target == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    experts = range(parameter.shape[0])
    if inner == "experts.down_proj":
        return [(f"experts.{e}.{down}.weight", Piece(inner, e)) for e in experts]
    halves = enumerate((gate, up))
    return [(f"experts.{e}.{name}.weight", Piece(inner, e, half)) for half, name in halves for e in experts]


def export_weights(plan: ExportPlan, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes weights, config.json and generation_config.json into an existing directory.

    Raises:
        CheckpointError: the disk is full.
    """
    infos = plan.infos
    check_space(folder, sum(info.nbytes for info in infos.values()))
    with CheckpointWriter(folder, infos, max_shard_bytes) as writer:
        read: tuple[str, Tensor | None] = ("", None)
        for name, (key, piece) in plan.pieces.items():
            if read[0] != key:
                read = (key, plan.stored.read(key))
            assert read[1] is not None
            writer.write(name, piece.of(read[1]))
        for name, info in plan.zeros.items():
            writer.write(name, torch.zeros(info.shape, dtype=info.dtype))
    plan.config.save_pretrained(folder)
    generation = plan.stored.path / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
