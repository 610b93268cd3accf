"""Finds the feed-forward blocks of a transformers decoder and puts MoE layers in their place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from llava_moe.model.configuration import MoeSection
from llava_moe.moe import EXPERTS, ROUTERS, MlpSpec, MoELayer, RoutingScope


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
)


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
    up, down = linears[pattern.up], linears[pattern.down]
    biases = {linear.bias is not None for linear in linears.values()}
    if len(biases) != 1:
        raise ValueError(f"{type(block).__name__}: some of its projections have a bias and some have none")
    return MlpSpec(
        hidden=up.in_features,
        intermediate=down.in_features,
        activation=activation,
        gated=pattern.gate is not None,
        bias=biases.pop(),
        gate_name=pattern.gate,
        up_name=pattern.up,
        down_name=pattern.down,
    )


def activation_name(config: PretrainedConfig) -> str:
    """The activation of a decoder's feed-forward blocks, from its config.

    Raises:
        ValueError: the config names none under the keys that transformers uses.
    """
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        name = getattr(config, key, None)
        if isinstance(name, str):
            return name
    raise ValueError(f"{type(config).__name__} names no activation (hidden_act, hidden_activation)")


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The list of decoder layers, each of which has a `.mlp`.

    Raises:
        ValueError: the decoder is built in another way.
    """
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(layer, "mlp") for layer in layers):
        raise ValueError(f"{type(decoder).__name__} has no list `layers` whose members have `.mlp`")
    return layers


def install_moe(decoder: nn.Module, config: PretrainedConfig, section: MoeSection, scope: RoutingScope) -> None:
    """Replaces the feed-forward blocks of the listed layers; called inside the model's `__init__` and nowhere else.

    Raises:
        ValueError: a layer index does not exist, a block is of an unknown kind, or a router is refused here.
    """
    layers = decoder_layers(decoder)
    missing = [i for i in section.layers if not 0 <= i < len(layers)]
    if missing:
        raise ValueError(f"moe.layers names {missing}, but the decoder has layers 0..{len(layers) - 1}")
    router_class = ROUTERS.get(section.router.name)
    experts_class = EXPERTS.get(section.experts.name)
    if not router_class.causal_safe:
        raise ValueError(f"router {section.router.name!r} looks at later tokens and cannot be used in a decoder")
    activation = activation_name(config)
    for index in section.layers:
        spec = mlp_spec(layers[index].get_submodule("mlp"), activation)
        router = router_class.build(spec.hidden, section.num_experts, section.router.args)
        experts = experts_class(spec, section.num_experts, **section.experts.args)
        layers[index].mlp = MoELayer(router, experts, layer=index, scope=scope)
