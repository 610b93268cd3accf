"""transformers' own LLaVA classes: the same tensors under our config, and its sparse decoders as ours with experts.

    mixtral    -> mistral     every layer sparse, softmax over the chosen experts
    qwen2_moe  -> qwen2       the layers that its config leaves sparse, gated shared experts
    qwen3_moe  -> qwen3       likewise, none shared

The inverse of `exporting`: the function stays the same, and our layers record their routings. Other sparse decoders
stay transformers' own where `native.py` can read their routings.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from llava_moe.model.families import FAMILIES, family_of
from llava_moe.model.formats.parts import moe_part, renamed
from llava_moe.model.formats.tensors import Lazy, State, read_json
from llava_moe.model.modeling import CheckpointError
from llava_moe.model.native import NATIVE_FAMILIES

DENSE = {"mixtral": "mistral", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3"}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_HF_NAMES = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^(vision_tower\.|multi_modal_projector\.|image_newline$)"), r"model.\1"),
)
_BLOCK = re.compile(r"^(model\.language_model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.(.+)$")
_EXPERT = re.compile(r"^experts\.(\d+)\.(w[123]|gate_proj|up_proj|down_proj)\.weight$")
_NATIVE = re.compile(r"^(model\.language_model\.layers\.\d+\.mlp\.experts\.\d+)\.(\w+)\.weight$")
_SHARED = re.compile(r"^shared_expert\.(gate|up|down)_proj\.weight$")
_PARTS = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def read_hf(path: Path, state: State) -> tuple[Any, State, list[str]]:
    """Our config, the tensors under our names, and the origins of those that only an absent block would need.

    Raises:
        CheckpointError: the class or its decoder has no counterpart here.
    """
    kind = read_json(path / "config.json").get("model_type")
    if kind not in FAMILIES:
        ours = family_of(str(kind)) is not None
        raise CheckpointError(
            f"{path}: model_type is {kind!r}; of transformers' classes {', '.join(FAMILIES)} can be imported"
            + (", and this is a checkpoint of ours already" if ours else "")
        )
    try:
        stock: Any = AutoConfig.from_pretrained(path)
        text, part = _dense_text(stock.text_config, path)
        values = {key: value for key, value in stock.to_dict().items() if key not in ("model_type", "text_config")}
        moe = None if part is None else {"decoder": part}
        config = FAMILIES.get(str(kind)).config(**values, text_config=text, moe=moe)
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path / 'config.json'}: {str(error).splitlines()[0]}") from error
    named = {_plain_name(name): lazy for name, lazy in state.items()}
    if part is not None:
        return config, *_our_experts(named, part["layers"], shared="shared" in part)
    if text.model_type in NATIVE_FAMILIES:
        named = renamed(named, _NATIVE, lambda match: f"{match[1]}.{_PARTS[match[2]]}.weight")
    return config, named, []


def _plain_name(name: str) -> str:
    for pattern, replacement in _HF_NAMES:
        name = pattern.sub(replacement, name)
    return name


def _dense_text(text: Any, path: Path) -> tuple[PretrainedConfig, dict[str, Any] | None]:
    """The config of the dense decoder and the section of its experts; a dense one is handed through.

    Raises:
        CheckpointError: its experts, or something beside them, have no counterpart here.
    """
    family = DENSE.get(text.model_type)
    if family is None:
        sparse = "moe" in text.model_type or any(hasattr(text, key) for key in _COUNTS)
        if sparse and text.model_type not in NATIVE_FAMILIES:
            raise CheckpointError(
                f"{path}: its decoder ({text.model_type}) is a mixture of experts of transformers' own that cannot be "
                f"imported; those that can: {', '.join(sorted(NATIVE_FAMILIES))}"
            )
        return text, None
    if getattr(text, "use_sliding_window", False) or not getattr(text, "qkv_bias", True):
        raise CheckpointError(
            f"{path}: its {text.model_type} decoder has a sliding window or no biases in its attention"
        )
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])} | {"head_dim"}
    drop = {"architectures", "model_type", "transformers_version", "layer_types"}
    drop |= set() if family == "mistral" else {"sliding_window"}
    values = {key: value for key, value in text.to_dict().items() if key in known - drop}
    return CONFIG_MAPPING[family](**values), _section(text)


def _section(text: Any) -> dict[str, Any]:
    mixtral = text.model_type == "mixtral"
    layers = list(range(text.num_hidden_layers))
    if not mixtral:
        step, dense = text.decoder_sparse_step, set(text.mlp_only_layers or ())
        layers = [index for index in layers if index not in dense and (index + 1) % step == 0]
    renormalised = mixtral or text.norm_topk_prob
    number = text.num_local_experts if mixtral else text.num_experts
    convention = "softmax_topk_renorm" if renormalised else "softmax_topk"
    part = moe_part(dict.fromkeys(layers, number), text.num_experts_per_tok, convention)
    if not mixtral and text.moe_intermediate_size != text.intermediate_size:
        part["expert_width"] = text.moe_intermediate_size
    if getattr(text, "shared_expert_intermediate_size", 0):
        part["shared"] = {"num": 1, "width": text.shared_expert_intermediate_size, "mix": "gated"}
    return part


def _our_experts(state: State, layers: list[int], shared: bool) -> tuple[State, list[str]]:
    """Tensors of sparse blocks under the names that `target.place` knows."""
    blocks = {f"model.language_model.layers.{index}" for index in layers}
    found: State = {}
    left_out: list[str] = []
    for name, lazy in state.items():
        match = _BLOCK.match(name)
        if match is None or match[1] not in blocks:
            found[name] = lazy
        elif not shared and match[2].startswith("shared_expert"):
            left_out.append(lazy.origin)  # the gate of a block that is not there
        else:
            found[f"{match[1]}.mlp.{_our_name(match[2], lazy)}"] = lazy
    return found, left_out


def _our_name(inner: str, lazy: Lazy) -> str:
    if inner == "gate.weight":
        return "router.scorer.weight"
    if inner == "shared_expert_gate.weight":
        return "shared.gate"
    if (expert := _EXPERT.match(inner)) is not None:
        return f"experts.{expert[1]}.{_PARTS[expert[2]]}.weight"
    if (part := _SHARED.match(inner)) is not None:
        return f"shared.block.0.{part[1]}.weight"
    raise CheckpointError(f"{lazy.origin}: has no place in a layer of experts")
