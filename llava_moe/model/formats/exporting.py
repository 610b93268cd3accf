"""A checkpoint of ours out, as one of transformers' own classes: readable without this project, and served by engines.

A dense model becomes `LlavaForConditionalGeneration` as it is. One with experts becomes the same class around a decoder
that transformers has with experts:

    Llama, Mistral  -> mixtral      every layer sparse, weights of the chosen experts sum to 1
    Qwen2           -> qwen2_moe    any layers; weights with or without that; gated shared experts
    Qwen3           -> qwen3_moe    any layers; weights with or without that

All else is refused by name. Tensors get the names of published llava-hf files, which serving engines map from:
`vision_tower.vision_model.*`, `language_model.model.*`, and each expert by itself.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, LlavaConfig, LlavaForConditionalGeneration, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llava_moe.model.assemble import check_checkpoint, load_model
from llava_moe.model.configuration import LlavaMoeConfig, MoePart
from llava_moe.model.layout import Piece, StoredModel
from llava_moe.model.measuring import TOLERANCE
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.offload import WHOLE_MODEL_BYTES
from llava_moe.model.streaming import MAX_SHARD_BYTES, CheckpointWriter, TensorInfo, check_space

TARGETS = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
_SUMS_TO_ONE = {"softmax_topk_renorm": True, "topk_softmax": True, "softmax_topk": False}
_WRAPPED_TOWERS = ("clip_vision_model", "siglip_vision_model")
_OWN_KEYS = ("model_type", "projector", "moe", "architectures", "transformers_version")


@dataclass(frozen=True)
class ExportPlan:
    """What will be written.

    Attributes:
        target: the model_type of the decoder.
        pieces: for each name on disk, the parameter of ours and which part of it.
        zeros: tensors that the class has, that we have not, and that must do nothing.
    """

    stored: StoredModel
    config: LlavaConfig
    target: str
    pieces: dict[str, tuple[str, Piece]]
    zeros: dict[str, TensorInfo]

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
    config: LlavaMoeConfig = stored.config
    section = config.moe_section
    parts = {} if section is None else section.parts()
    _check_outside(path, config, list(parts))
    text: Any = config.text_config
    blocks: dict[str, int | None] = {}
    if "decoder" in parts:
        text = _moe_text(path, stored, parts["decoder"])
        blocks = {f"model.language_model.layers.{index}.mlp.": index for index in parts["decoder"].layers}
    text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]  # what vLLM builds the decoder by
    values = {key: value for key, value in config.to_dict().items() if key not in _OWN_KEYS}
    stock = LlavaConfig(**{**values, "text_config": text, "vision_config": config.vision_config})
    stock.architectures = [LlavaForConditionalGeneration.__name__]
    pieces, zeros = _pieces(path, stored, text.model_type, list(blocks))
    return ExportPlan(stored, stock, text.model_type, pieces, zeros)


def _check_outside(path: Path, config: LlavaMoeConfig, parts: list[str]) -> None:
    """Tower and projector: what has no counterpart in the stock class."""
    experts = [part for part in parts if part != "decoder"]
    if experts:
        raise CheckpointError(
            f"{path}: has experts in its {' and '.join(experts)}, and transformers' LLaVA has dense ones; it is used "
            "with `import llava_moe`"
        )
    if config.projector != "mlp2x_gelu":
        raise CheckpointError(
            f"{path}: its projector is {config.projector!r}, and that of transformers' LLaVA is two linear maps with "
            "an activation between them (mlp2x_gelu)"
        )
    kind = config.vision_config.model_type
    if kind.startswith("llava_moe"):
        raise CheckpointError(f"{path}: its vision tower ({kind}) is a class of this project alone")


def _moe_text(path: Path, stored: StoredModel, part: MoePart) -> PretrainedConfig:
    """The config of the sparse decoder in the place of our dense one with a section."""
    text: Any = stored.config.text_config
    layers = int(text.num_hidden_layers)
    target = TARGETS.get(text.model_type)
    if target is None:
        raise CheckpointError(
            f"{path}: a {text.model_type} decoder with experts has no class in transformers; "
            f"those that have: {', '.join(f'{ours} ({theirs})' for ours, theirs in TARGETS.items())}"
        )
    k, renormalised = _check_router(path, part)
    _check_decoder(path, text, target, part, renormalised)
    block = f"model.language_model.layers.{part.layers[0]}.mlp."
    width = stored.state[f"{block}experts.down_proj"].shape[-1]
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[target])} | {"head_dim"}
    drop = {"architectures", "model_type", "transformers_version", "layer_types"}
    values = {key: value for key, value in text.to_dict().items() if key in known - drop}
    values |= {"num_experts_per_tok": k, "output_router_logits": False}
    if target == "mixtral":
        values |= {"num_local_experts": part.num_experts[0], "intermediate_size": width}
    else:
        dense = [index for index in range(layers) if index not in part.layers]
        values |= {"num_experts": part.num_experts[0], "moe_intermediate_size": width, "mlp_only_layers": dense}
        values |= {"decoder_sparse_step": 1, "norm_topk_prob": renormalised}
    if target == "qwen2_moe":
        shared = stored.state.get(f"{block}shared.block.down_proj")
        values["shared_expert_intermediate_size"] = 0 if shared is None else shared.shape[-1]
    return CONFIG_MAPPING[target](**values)


def _check_router(path: Path, part: MoePart) -> tuple[int, bool]:
    """k, and whether the weights of the chosen experts sum to 1."""
    args = {"k": 2, "convention": "softmax_topk_renorm", "bias": False, "scheduled_k": False, **part.router.args}
    why = None
    if part.router.name != "top_k":
        why = f"its router is {part.router.name!r}; transformers' sparse decoders have top_k alone"
    elif args["bias"] or args["scheduled_k"]:
        why = "its router has a bias or a scheduled k, and those of transformers have not"
    elif part.experts.name != "stacked":
        why = f"its experts are {part.experts.name!r}; transformers' are whole feed-forward blocks (stacked)"
    elif len(set(part.num_experts)) > 1:
        why = f"its layers have {list(part.num_experts)} experts, and transformers has one number for all"
    if why is not None:
        raise CheckpointError(f"{path}: {why}")
    return int(args["k"]), _SUMS_TO_ONE[args["convention"]]


def _check_decoder(path: Path, text: Any, target: str, part: MoePart, renormalised: bool) -> None:
    """What each target cannot do."""
    why = None
    dense = [index for index in range(text.num_hidden_layers) if index not in part.layers]
    if target == "mixtral" and dense:
        why = f"layers {dense} are dense, and in a mixtral every layer has experts"
    elif target == "mixtral" and not renormalised:
        why = "the weights of its experts do not sum to 1 (softmax_topk), and those of a mixtral do"
    elif target == "mixtral" and (getattr(text, "attention_bias", False) or getattr(text, "mlp_bias", False)):
        why = "its attention or feed-forward maps have biases, and those of a mixtral have not"
    elif target != "mixtral" and getattr(text, "use_sliding_window", False):
        why = f"its attention has a sliding window in some layers, which {target} does not have in the same ones"
    elif part.shared is not None and (target != "qwen2_moe" or part.shared.get("mix", "sum") != "gated"):
        why = f"it has shared experts ({part.shared}), and only a qwen2_moe has such, gated ones"
    if why is not None:
        raise CheckpointError(f"{path}: cannot become a {target} decoder: {why}")


def _pieces(
    path: Path, stored: StoredModel, target: str, blocks: list[str]
) -> tuple[dict[str, tuple[str, Piece]], dict[str, TensorInfo]]:
    pieces: dict[str, tuple[str, Piece]] = {}
    zeros: dict[str, TensorInfo] = {}
    tied = stored.model.all_tied_weights_keys
    tower = stored.config.vision_config.model_type
    for key, parameter in stored.state.items():
        block = next((block for block in blocks if key.startswith(block)), None)
        if key in tied:
            continue
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
    """What one parameter of an MoE layer becomes, by names inside the layer."""
    gate, up, down = ("w1", "w3", "w2") if target == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    experts = range(parameter.shape[0])
    if inner == "router.scorer.weight":
        return [("gate.weight", Piece(inner))]
    if inner == "experts.gate_up_proj":
        halves = enumerate((gate, up))
        return [(f"experts.{e}.{name}.weight", Piece(inner, e, half)) for half, name in halves for e in experts]
    if inner == "experts.down_proj":
        return [(f"experts.{e}.{down}.weight", Piece(inner, e)) for e in experts]
    if inner == "shared.gate":
        return [("shared_expert_gate.weight", Piece(inner))]
    if inner == "shared.block.gate_up_proj":
        return [(f"shared_expert.{name}.weight", Piece(inner, 0, half)) for half, name in enumerate((gate, up))]
    if inner == "shared.block.down_proj":
        return [(f"shared_expert.{down}.weight", Piece(inner, 0))]
    raise CheckpointError(f"{path}: {inner} of its MoE layers has no place in a {target} decoder")


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


@torch.no_grad()
def check_export(plan: ExportPlan, folder: Path, whole_bytes: int = WHOLE_MODEL_BYTES) -> float | None:
    """The largest difference of the logits of the two models on one picture and some text; None if they are too large.

    Raises:
        CheckpointError: the stock class misses a tensor, or computes something else.
    """
    if plan.stored.reader.float32_bytes > whole_bytes:
        return None
    stock_class: Any = LlavaForConditionalGeneration
    stock, info = stock_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    state = stock.state_dict()
    missing = sorted(key for key in info["missing_keys"] if key not in state or state[key].numel())
    wrong = [*missing, *sorted(info["unexpected_keys"])]
    if wrong:
        raise CheckpointError(f"{folder}: transformers misses or does not know {', '.join(wrong[:4])}")
    config: Any = plan.config
    ours = load_model(plan.stored.path)
    generator = torch.Generator().manual_seed(0)
    size, token = config.vision_config.image_size, config.image_token_index
    ids = torch.randint(0, min(config.text_config.vocab_size, token), (1, 16), generator=generator)
    ids = torch.cat([ids[:, :4], torch.full((1, config.image_seq_length), token), ids[:, 4:]], dim=1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, size, size, generator=generator)}
    expected, found = ours(**inputs).logits, stock.eval()(**inputs).logits
    error = float((found - expected).abs().max())
    if error > TOLERANCE * max(1.0, float(expected.abs().max())):
        raise CheckpointError(f"{plan.stored.path}: the export's logits differ by {error:.2e}; nothing was written")
    return error
