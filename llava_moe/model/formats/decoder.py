"""The language model inside a LLaVA checkpoint: its family from the names of its tensors, its config from LLaVA's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from llava_moe.model.formats.tensors import State
from llava_moe.model.modeling import CheckpointError

_FIRST = "model.layers.0."
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
# Keys that some family wrote under another name, and what no config class declares but transformers understands.
_OLD_KEYS = {"stablelm": {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}}
_EXTRA_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor", "head_dim", "attention_bias", "mlp_bias")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "stablelm")


def decoder_family(names: Iterable[str], raw: dict[str, Any], where: str) -> str:
    """The transformers family that tensors of these names belong to.

    Raises:
        CheckpointError: none that can be imported.
    """
    names = set(names)

    def has(suffix: str) -> bool:
        return f"{_FIRST}{suffix}" in names

    kind = str(raw.get("model_type", ""))
    attention = has("self_attn.q_proj.weight")
    if attention and "gemma" not in kind and not has("pre_feedforward_layernorm.weight"):
        if has("self_attn.q_norm.weight"):
            return "qwen3"
        if has("self_attn.dense.weight"):
            return "phi"
        if "model.norm.bias" in names:
            return "stablelm"
        if has("self_attn.q_proj.bias") and not has("self_attn.o_proj.bias"):
            return "qwen2"
        # Llama and Mistral differ by no tensor and, without a window, by no computation.
        return "mistral" if raw.get("sliding_window") is not None or "mistral" in kind else "llama"
    if has("self_attn.qkv_proj.weight") and has("mlp.gate_up_proj.weight"):
        return "phi3"
    first = sorted(name for name in names if "mm_projector" not in name)[:3]
    raise CheckpointError(
        f"{where}: its decoder (model_type {kind!r}, first tensors {', '.join(first) or 'none'}) cannot be imported; "
        f"known families: {', '.join(FAMILIES)}"
    )


def decoder_config(state: State, raw: dict[str, Any], where: str) -> PretrainedConfig:
    """The text config, from LLaVA's flat config.json and the decoder's tensors.

    Raises:
        CheckpointError: the family is not known, or config.json does not describe the weights.
    """
    family = decoder_family(state, raw, where)
    config_class = CONFIG_MAPPING[family]
    known = {field.name for field in dataclasses.fields(config_class)} | set(_EXTRA_KEYS)
    values = {_OLD_KEYS.get(family, {}).get(key, key): value for key, value in raw.items()}
    # null stands for the default of the config's class, but for a window: Mistral's default has one, and null has none
    values = {
        key: value for key, value in values.items() if key in known and (value is not None or key == "sliding_window")
    }
    for key in ("architectures", "dtype", "torch_dtype", "transformers_version", "model_type"):
        values.pop(key, None)
    layers = [int(match[1]) for name in state if (match := _LAYER.match(name)) is not None]
    if max(layers) + 1 != values.get("num_hidden_layers"):
        raise CheckpointError(
            f"{where}: config.json says num_hidden_layers={values.get('num_hidden_layers')}, but there are weights of "
            f"{max(layers) + 1} layers"
        )
    if "model.embed_tokens.weight" not in state:
        raise CheckpointError(f"{where}: model.embed_tokens.weight is missing")
    values["vocab_size"] = state["model.embed_tokens.weight"].info.shape[0]
    if family == "stablelm":
        values["use_qkv_bias"] = f"{_FIRST}self_attn.q_proj.bias" in state  # written under several names
    if "lm_head.weight" not in state:
        values["tie_word_embeddings"] = True
    try:
        config: PretrainedConfig = config_class(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: config.json does not make a {family} config: {error}") from error
    return config
