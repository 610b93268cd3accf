"""Finding feed-forward blocks by their children, and putting MoE layers in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, GPT2Config, LlamaConfig, MambaConfig, MixtralConfig, PretrainedConfig

from llava_moe.model.configuration import MoePart
from llava_moe.model.sites import activation_name, decoder_layers, install_moe, mlp_spec
from llava_moe.moe import ROUTERS, MlpSpec, MoELayer, RoutingScope, TopKRouter
from tests.tiny_model import HIDDEN, INTERMEDIATE, tiny_moe, tiny_text_config

FAMILIES: dict[str, tuple[str, bool, bool, str | None, str, str]] = {
    # activation, gated, bias, gate, up, down
    "llama": ("silu", True, False, "gate_proj", "up_proj", "down_proj"),
    "mistral": ("silu", True, False, "gate_proj", "up_proj", "down_proj"),
    "qwen2": ("silu", True, False, "gate_proj", "up_proj", "down_proj"),
    "qwen3": ("silu", True, False, "gate_proj", "up_proj", "down_proj"),
    "gemma2": ("gelu_pytorch_tanh", True, False, "gate_proj", "up_proj", "down_proj"),
    "phi3": ("silu", True, False, "gate_up_proj", "gate_up_proj", "down_proj"),
    "glm": ("silu", True, False, "gate_up_proj", "gate_up_proj", "down_proj"),
    "phi": ("gelu_new", False, True, None, "fc1", "fc2"),
    "gpt_neox": ("gelu", False, True, None, "dense_h_to_4h", "dense_4h_to_h"),
    "stablelm": ("silu", True, False, "gate_proj", "up_proj", "down_proj"),
    "olmo2": ("silu", True, False, "gate_proj", "up_proj", "down_proj"),
    "granite": ("silu", True, False, "gate_proj", "up_proj", "down_proj"),
    "starcoder2": ("gelu_pytorch_tanh", False, True, None, "c_fc", "c_proj"),
    "nemotron": ("relu2", False, False, None, "up_proj", "down_proj"),
    "smollm3": ("silu", True, False, "gate_proj", "up_proj", "down_proj"),
}


def part(**changes: Any) -> MoePart:
    """The decoder's part of `tiny_moe`."""
    return MoePart.from_dict(tiny_moe(**changes)["decoder"], "moe.decoder")


def decoder_of(text: str) -> nn.Module:
    return AutoModel.from_config(tiny_text_config(text))


@pytest.mark.parametrize("text", FAMILIES)
def test_spec_of_a_family(text: str) -> None:
    decoder = decoder_of(text)
    activation, gated, bias, *names = FAMILIES[text]
    found = mlp_spec(decoder_layers(decoder)[0].mlp, activation_name(decoder.config))
    assert found == MlpSpec(HIDDEN, INTERMEDIATE, activation, gated, bias, *names)


def test_unknown_pattern_lists_the_children() -> None:
    block = nn.ModuleDict({"alpha": nn.Linear(2, 3), "beta": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})
    with pytest.raises(ValueError, match=r"ModuleDict matches no known .*\['alpha', 'beta'\].*sites\.py"):
        mlp_spec(block, "silu")


def test_a_block_with_one_projection_too_many_is_unknown() -> None:
    names = ("gate_proj", "up_proj", "down_proj", "shared_proj")
    block = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    with pytest.raises(ValueError, match="shared_proj"):
        mlp_spec(block, "silu")


def test_half_a_bias_is_refused() -> None:
    block = nn.ModuleDict({"up_proj": nn.Linear(4, 6), "down_proj": nn.Linear(6, 4, bias=False)})
    with pytest.raises(ValueError, match="some of its projections have a bias"):
        mlp_spec(block, "silu")


def test_a_decoder_that_is_sparse_already_is_refused() -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="matches no known feed-forward pattern"):
        install_moe(AutoModel.from_config(config), "decoder", part(layers=[0]), "silu", RoutingScope())


def test_a_decoder_without_layers_is_refused() -> None:
    decoder = AutoModel.from_config(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(
        ValueError, match=r"no list of layers with a child mlp.*; found layers of MambaBlock \(norm, mixer\)"
    ):
        decoder_layers(decoder)


def test_an_unknown_block_is_refused_by_what_it_holds() -> None:
    decoder = AutoModel.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match="GPT2MLP matches no known feed-forward pattern: its linear children are none"):
        install_moe(decoder, "decoder", part(layers=[0]), "gelu_new", RoutingScope())


def test_a_config_without_an_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="names no activation"):
        activation_name(PretrainedConfig())


def test_install_replaces_the_listed_layers_only() -> None:
    decoder, scope = decoder_of("llama"), RoutingScope()
    install_moe(decoder, "decoder", part(layers=[3, 1]), "silu", scope)
    kinds = [isinstance(layer.mlp, MoELayer) for layer in decoder.layers]
    assert kinds == [False, True, False, True]
    assert [layer.mlp.layer for layer in decoder.layers if isinstance(layer.mlp, MoELayer)] == [1, 3]
    assert all(layer.mlp.scope is scope for layer in decoder.layers if isinstance(layer.mlp, MoELayer))


def test_routers_of_two_layers_start_differently() -> None:
    decoder = decoder_of("llama")
    install_moe(decoder, "decoder", part(), "silu", RoutingScope())
    weights = [decoder.layers[i].mlp.router.scorer.weight for i in (0, 2)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("layers", [[4], [-1], [0, 17]])
def test_layers_that_do_not_exist(layers: list[int]) -> None:
    decoder = decoder_of("llama")
    with pytest.raises(ValueError, match=r"the decoder has layers 0\.\.3"):
        install_moe(decoder, "decoder", part(layers=layers), "silu", RoutingScope())


def test_a_router_that_looks_ahead_is_refused_in_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    class LooksAhead(TopKRouter):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.causal_safe = False

    monkeypatch.setitem(ROUTERS._entries, "looks_ahead", LooksAhead)
    decoder = decoder_of("llama")
    section = part(router={"name": "looks_ahead"})
    with pytest.raises(ValueError, match="'looks_ahead' looks at later tokens"):
        install_moe(decoder, "decoder", section, "silu", RoutingScope())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": {"name": "topk"}}, "unknown router 'topk'; did you mean 'top_k'"),
        ({"router": {"name": "top_k", "args": {"kk": 1}}}, "no option 'kk'"),
        ({"router": {"name": "top_k", "args": {"k": 9}}}, "k=9 must be between 1 and the 4 experts"),
        ({"experts": {"name": "stakced"}}, "unknown experts 'stakced'; did you mean 'stacked'"),
        ({"experts": {"name": "stacked", "args": {"kernel": "looop"}}}, "did you mean 'loop'"),
    ],
)
def test_wrong_names_in_the_section(changes: dict[str, object], message: str) -> None:
    config = LlamaConfig(**tiny_text_config("llama").to_dict())
    with pytest.raises(ValueError, match=message):
        install_moe(AutoModel.from_config(config), "decoder", part(**changes), "silu", RoutingScope())
