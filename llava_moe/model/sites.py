"""Finds the feed-forward blocks of a decoder, a vision tower or a projector, and puts MoE layers in their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from llava_moe.model.configuration import MoePart
from llava_moe.moe import LayerPlan, MlpSpec, RoutingScope, build_layer


@dataclass(frozen=True)
class _Pattern:
    """Child names by which a kind of feed-forward block is known."""

    gate: str | None
    up: str
    down: str

    @property
    def children(self) -> set[str]:
        return {name for name in (self.gate, self.up, self.down) if name is not None}


_PATTERNS = (
    _Pattern("gate_proj", "up_proj", "down_proj"),  # Llama, Mistral, Qwen2/3, Gemma, OLMo2, StableLM, SmolLM3
    _Pattern("gate_up_proj", "gate_up_proj", "down_proj"),  # Phi-3, GLM: one matrix, gate rows first
    _Pattern("w1", "w3", "w2"),  # InternLM-style
    _Pattern(None, "fc1", "fc2"),  # Phi-2, SigLIP, CLIP
    _Pattern(None, "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX
    _Pattern(None, "up_proj", "down_proj"),  # Nemotron
    _Pattern(None, "c_fc", "c_proj"),  # StarCoder2
    _Pattern(None, "fc_in", "fc_out"),  # GPT-J, CodeGen
    _Pattern("Wi", "Wi", "Wo"),  # ModernBERT's decoder: one matrix, gate rows first
    _Pattern(None, "linear_1", "linear_2"),  # the projector of LLaVA-1.5
)
# Families whose code fixes what others read from their config.
_FIXED_ACTIVATIONS = {"lfm2": "silu", "lfm3": "silu"}
_BLOCK_NAMES = ("mlp", "feed_forward", "ffn", "mlp_block")


def mlp_spec(block: nn.Module, activation: str) -> MlpSpec:
    """Reads the shape of a dense feed-forward block from its child modules.

    Sizes come from the Linear attributes and not from weight shapes, which are empty under ZeRO-3.

    Raises:
        ValueError: the children match no known pattern; the message lists what was found.
    """
    linears = {name: child for name, child in block.named_children() if isinstance(child, nn.Linear)}
    for pattern in _PATTERNS:
        if set(linears) == pattern.children:
            break
    else:
        raise ValueError(
            f"{type(block).__name__} matches no known feed-forward pattern: its linear children are "
            f"{sorted(linears) or 'none'}; known patterns: {[sorted(p.children) for p in _PATTERNS]}. "
            "Add a pattern to llava_moe/model/sites.py"
        )
    others = [name for name, _ in block.named_parameters() if name.split(".")[0] not in linears]
    if others:
        raise ValueError(f"{type(block).__name__} computes more than a feed-forward block: it also has {others}")
    up, down = linears[pattern.up], linears[pattern.down]
    biases = {linear.bias is not None for linear in linears.values()}
    if len(biases) != 1:
        raise ValueError(f"{type(block).__name__}: some of its projections have a bias and some have none")
    return MlpSpec(
        hidden=up.in_features,
        intermediate=down.in_features,
        out=None if down.out_features == up.in_features else down.out_features,
        activation=activation,
        gated=pattern.gate is not None,
        bias=biases.pop(),
        gate_name=pattern.gate,
        up_name=pattern.up,
        down_name=pattern.down,
    )


def activation_name(config: PretrainedConfig) -> str:
    """The activation of a decoder's or a tower's feed-forward blocks, from its config.

    Raises:
        ValueError: the config names none under the keys that transformers uses.
    """
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        name = getattr(config, key, None)
        if isinstance(name, str):
            return name
    inner = getattr(config, "tower", None)  # of a tower at several scales
    if isinstance(inner, dict):
        return activation_name(CONFIG_MAPPING[inner["model_type"]](**inner))
    if config.model_type in _FIXED_ACTIVATIONS:
        return _FIXED_ACTIVATIONS[config.model_type]
    raise ValueError(f"{type(config).__name__} names no activation (hidden_act, hidden_activation)")


@dataclass(frozen=True)
class Blocks:
    """The stack of a decoder or a tower: `layers` lies at `path` inside it, and each member has a block `name`."""

    path: str
    layers: nn.ModuleList
    name: str

    def block_path(self, index: int) -> str:
        """Where the feed-forward block of a layer lies inside the decoder or tower."""
        return f"{self.path}.{index}.{self.name}"


def find_blocks(module: nn.Module) -> Blocks:
    """The first list of layers that all have a feed-forward block.

    Raises:
        ValueError: there is none; the message lists the module lists that were found.
    """
    lists = {path: m for path, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    for path, layers in lists.items():
        for name in _BLOCK_NAMES:
            if all(isinstance(getattr(layer, name, None), nn.Module) for layer in layers):
                return Blocks(path, layers, name)
    members = [f"{path} of {type(m[0]).__name__} ({_children(m[0])})" for path, m in lists.items()]
    raise ValueError(
        f"{type(module).__name__} has no list of layers with a child {' or '.join(_BLOCK_NAMES)}; "
        f"found {'; '.join(members[:3]) or 'no list of layers'}"
    )


def _children(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children())


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The list of decoder layers, each of which has a feed-forward block."""
    return find_blocks(decoder).layers


def num_used_layers(num_layers: int, feature_layer: int | list[int]) -> int:
    """How many of a tower's layers come before the selected features.

    `hidden_states` has one entry more than there are layers: entry i is the input of layer i.
    """
    selected = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    return max(layer if layer >= 0 else num_layers + 1 + layer for layer in selected)


def install_moe(module: nn.Module, name: str, part: MoePart, activation: str, scope: RoutingScope) -> None:
    """Replaces the feed-forward blocks of the listed layers; called inside the model's `__init__` and nowhere else.

    Args:
        module: the decoder or the vision tower.
        name: "decoder" or "vision".

    Raises:
        ValueError: a layer index does not exist, a block is of an unknown kind, or a router is refused here.
    """
    blocks = find_blocks(module)
    check_layers(f"moe.{name}.layers", part.layers, len(blocks.layers), name)
    for index, num_experts in zip(part.layers, part.num_experts, strict=True):
        spec = mlp_spec(getattr(blocks.layers[index], blocks.name), activation)
        layer = moe_layer(part, spec, num_experts, index, name, scope)
        setattr(blocks.layers[index], blocks.name, layer)


def check_layers(where: str, layers: tuple[int, ...] | list[int], num_layers: int, name: str) -> None:
    """Raises ValueError when a layer does not exist."""
    missing = [i for i in layers if not 0 <= i < num_layers]
    if missing:
        raise ValueError(f"{where} names {missing}, but the {name} has layers 0..{num_layers - 1}")


def install_vision_moe(
    tower: nn.Module, config: Any, part: MoePart, feature_layer: int | list[int], scope: RoutingScope
) -> None:
    """As `install_moe`, for a tower; experts behind the selected feature layer would never run.

    Raises:
        ValueError: as there, or a layer lies behind the features, or the tower is a timm model.
    """
    if isinstance(getattr(config, "towers", None), list):
        raise ValueError("moe.vision: fused towers take no experts; use one tower alone, or at several scales (s2:)")
    blocks = find_blocks(tower)
    check_layers("moe.vision.layers", part.layers, len(blocks.layers), "vision tower")
    if isinstance(getattr(config, "tower", None), dict):
        feature_layer = config.feature_layer  # that of the multi-scale tower itself counts its single output
    used = num_used_layers(len(blocks.layers), feature_layer)
    behind = [i for i in part.layers if i >= used]
    if behind:
        raise ValueError(
            f"moe.vision.layers names {behind}, which lie behind the selected feature layer {feature_layer}: the model "
            f"reads what layer {used - 1} returns, so experts there would never learn"
        )
    install_moe(tower, "vision", part, activation_name(config), scope)


def projector_moe(projector: nn.Module, activation: str, part: MoePart, scope: RoutingScope) -> nn.Module:
    """The MoE layer that takes the place of a whole projector.

    Raises:
        ValueError: the projector is no feed-forward block, or the section names layers that it does not have.
    """
    if part.layers != (0,):
        raise ValueError(f"moe.projector.layers={list(part.layers)}: a projector is one block; write [0]")
    return moe_layer(part, mlp_spec(projector, activation), part.num_experts[0], 0, "projector", scope)


def moe_layer(part: MoePart, spec: MlpSpec, num_experts: int, index: int, name: str, scope: RoutingScope) -> nn.Module:
    """Builds one layer and refuses what cannot work at its place.

    Raises:
        ValueError: as `llava_moe.moe.build_layer`; or the router looks ahead in a decoder, or needs ids elsewhere.
    """
    plan = LayerPlan(
        num_experts=num_experts,
        router=part.router.name,
        router_args=part.router.args,
        experts=part.experts.name,
        experts_args=part.experts.args,
        shared=part.shared,
        capacity=part.capacity,
        expert_width=part.expert_width,
    )
    layer = build_layer(plan, spec, index, name, scope)
    if name == "decoder" and not layer.causal_safe and not part.allow_noncausal:
        raise ValueError(
            f"router {part.router.name!r} looks at later tokens and cannot be used in a decoder; "
            "allow_noncausal: true admits it where generation does not matter"
        )
    needs = getattr(getattr(layer, "router", None), "needs", ())
    if name != "decoder" and needs:
        raise ValueError(f"router {part.router.name!r} needs {', '.join(needs)}, which the {name} does not know")
    return layer


def specs_of(module: nn.Module, activation: str) -> Mapping[int, MlpSpec]:
    """The spec of every layer's feed-forward block of a dense decoder or tower."""
    blocks = find_blocks(module)
    return {i: mlp_spec(getattr(layer, blocks.name), activation) for i, layer in enumerate(blocks.layers)}
