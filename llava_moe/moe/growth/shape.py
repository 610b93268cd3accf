"""What a decoder is made of, in numbers and tensor names: all that growing it needs to know.

Covered are decoders of the Llama kind: RMSNorm, rotary positions, grouped-query attention, one feed-forward block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from llava_moe.registry import near_misses

Axis = Literal["vocabulary", "hidden", "intermediate", "query", "key_value", "head_dim"]
Kind = Literal["embedding", "matrix", "bias", "norm"]


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """One decoder.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width of the feed-forward block.
        heads, kv_heads: query heads, and key-value heads, which divide them evenly.
        head_dim: width of one head.
        layers: decoder layers.
        vocabulary: rows of the embedding.
        tied_head: whether the head is the embedding itself.
        gated: whether the feed-forward block has a gate.
        qkv_bias, out_bias: whether the projections into and out of the attention have biases.
        mlp_bias: whether those of the feed-forward block have.
        qk_norm: whether queries and keys are normed over the head.

    Raises:
        ValueError: a number is below 1, or the heads cannot be divided evenly.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int
    tied_head: bool = False
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for key in SIZES:
            if getattr(self, key) < 1:
                raise ValueError(f"decoder: {key}={getattr(self, key)} must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"decoder: kv_heads={self.kv_heads} must divide heads={self.heads}")

    @property
    def group(self) -> int:
        """Query heads of one key-value head."""
        return self.heads // self.kv_heads

    def size(self, axis: Axis) -> int:
        """Length of one axis of the tensors."""
        if axis == "query":
            return self.heads * self.head_dim
        if axis == "key_value":
            return self.kv_heads * self.head_dim
        return getattr(self, axis)

    def num_parameters(self) -> int:
        """All of them; a tied head counts once."""
        return sum(math.prod(self.size(axis) for axis in entry.axes) for entry in LLAMA_NAMES.entries(self).values())


SIZES = ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "layers", "vocabulary")


@dataclasses.dataclass(frozen=True)
class Entry:
    """The meaning of one tensor.

    Attributes:
        kind: "matrix" for what multiplies the hidden states, whose first axis is made and whose second is summed over.
        axes: what each axis runs over.
        layer: None outside the layers.
        template: its name with `{layer}` in the place of the number.
    """

    kind: Kind
    axes: tuple[Axis, ...]
    layer: int | None
    template: str

    def name(self, layer: int | None) -> str:
        """The name of the same tensor in another layer."""
        return self.template.format(layer=layer)


@dataclasses.dataclass(frozen=True)
class DecoderNames:
    """Tensor names of one family, without `.weight` and `.bias`; those of a layer have `{layer}` in them."""

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    query: str = "model.layers.{layer}.self_attn.q_proj"
    key: str = "model.layers.{layer}.self_attn.k_proj"
    value: str = "model.layers.{layer}.self_attn.v_proj"
    out: str = "model.layers.{layer}.self_attn.o_proj"
    query_norm: str = "model.layers.{layer}.self_attn.q_norm"
    key_norm: str = "model.layers.{layer}.self_attn.k_norm"
    gate: str = "model.layers.{layer}.mlp.gate_proj"
    up: str = "model.layers.{layer}.mlp.up_proj"
    down: str = "model.layers.{layer}.mlp.down_proj"
    attention_norm: str = "model.layers.{layer}.input_layernorm"
    mlp_norm: str = "model.layers.{layer}.post_attention_layernorm"

    def entries(self, shape: DecoderShape) -> dict[str, Entry]:
        """Every tensor of a decoder by its name."""
        entries = [Entry("embedding", ("vocabulary", "hidden"), None, f"{self.embedding}.weight")]
        for layer in range(shape.layers):
            entries += self._layer(shape, layer)
        entries.append(Entry("norm", ("hidden",), None, f"{self.norm}.weight"))
        if not shape.tied_head:
            entries.append(Entry("matrix", ("vocabulary", "hidden"), None, f"{self.head}.weight"))
        return {entry.name(entry.layer): entry for entry in entries}

    def _layer(self, shape: DecoderShape, layer: int) -> list[Entry]:
        linears: list[tuple[str, Axis, Axis, bool]] = [
            (self.query, "query", "hidden", shape.qkv_bias),
            (self.key, "key_value", "hidden", shape.qkv_bias),
            (self.value, "key_value", "hidden", shape.qkv_bias),
            (self.out, "hidden", "query", shape.out_bias),
            (self.up, "intermediate", "hidden", shape.mlp_bias),
            (self.down, "hidden", "intermediate", shape.mlp_bias),
        ]
        if shape.gated:
            linears.append((self.gate, "intermediate", "hidden", shape.mlp_bias))
        norms: list[tuple[str, Axis]] = [(self.attention_norm, "hidden"), (self.mlp_norm, "hidden")]
        if shape.qk_norm:
            norms += [(self.query_norm, "head_dim"), (self.key_norm, "head_dim")]
        entries = [Entry("norm", (axis,), layer, f"{name}.weight") for name, axis in norms]
        for name, made, summed, bias in linears:
            entries.append(Entry("matrix", (made, summed), layer, f"{name}.weight"))
            if bias:
                entries.append(Entry("bias", (made,), layer, f"{name}.bias"))
        return entries


LLAMA_NAMES = DecoderNames()


@dataclasses.dataclass(frozen=True)
class Family:
    """How a model type of transformers fills a `DecoderShape`; a string is the key of its config that decides."""

    names: DecoderNames = LLAMA_NAMES
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=True),
}
# Key of a transformers config for each size.
_CONFIG_KEYS = {
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "layers": "num_hidden_layers",
    "vocabulary": "vocab_size",
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a transformers config.

    Raises:
        ValueError: its model type is not known here.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise ValueError(f"cannot grow a model of type {model_type!r}; {near_misses(model_type, list(FAMILIES))}")
    return FAMILIES[model_type]


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """The shape of a decoder from its whole transformers config (`config.to_dict()`, with the defaults in it).

    Raises:
        ValueError: the family is unknown, or a key is missing.
    """
    family = family_of(config)
    sizes: dict[str, int] = {}
    for field, key in _CONFIG_KEYS.items():
        value = config.get(key)
        if value is None and field == "head_dim":
            value = sizes["hidden"] // sizes["heads"]
        if value is None:
            raise ValueError(f"the config of the decoder has no {key!r}")
        sizes[field] = int(value)

    def flag(value: bool | str) -> bool:
        return bool(config.get(value, False)) if isinstance(value, str) else value

    known: dict[str, Any] = {
        **sizes,
        "tied_head": flag("tie_word_embeddings"),
        "qkv_bias": flag(family.qkv_bias),
        "out_bias": flag(family.out_bias),
        "mlp_bias": flag(family.mlp_bias),
        "qk_norm": family.qk_norm,
    }
    return DecoderShape(**known)


def size_keys(shape: DecoderShape) -> dict[str, int]:
    """The sizes by their keys in a transformers config."""
    return {key: getattr(shape, field) for field, key in _CONFIG_KEYS.items()}
