"""Grown decoders against transformers' own models, and the rules of width and depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llava_moe.moe import GROWERS, UPCYCLERS, DecoderShape, Grower, MlpSpec, MoELayer, StackedExperts
from llava_moe.moe.growth import FAMILIES, Contract, family_of, read_shape
from llava_moe.moe.upcycling import DenseMlp
from tests.moe.cases import make_router
from tests.reference import oracles_upcycling as oracles

MODELS: dict[str, tuple[type[PretrainedConfig], Callable[[Any], nn.Module]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SMALL = {
    "vocab_size": 23,
    "hidden_size": 40,  # a multiple of 8 and of 10 heads, as LlamaConfig wants
    "intermediate_size": 20,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
every_grower = pytest.mark.parametrize("name", GROWERS.names())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_model(family: str, **changes: Any) -> nn.Module:
    """A tiny model in which every tensor matters: nothing is zero or one."""
    config_class, model_class = MODELS[family]
    model = model_class(config_class(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
    return model


def grow(model: nn.Module, name: str, args: dict[str, Any] | None = None, **sizes: int) -> tuple[Grower, nn.Module]:
    """The grown model of the same family, loaded strictly, tensor by tensor."""
    config = model.config.to_dict()
    source = read_shape(config)
    grower = GROWERS.get(name).build(args or {}, source, dataclasses.replace(source, **sizes))
    config_class, model_class = MODELS[config["model_type"]]
    grown = model_class(config_class.from_dict(grower.grow_config(config))).eval()
    state = model.state_dict()
    result = {key: grower.target_tensor(key, state.__getitem__) for key in grower.tensor_names()}
    missing, unexpected = grown.load_state_dict(result, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if source.tied_head else set())
    grown.tie_weights()
    return grower, grown


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 23, (2, 11), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids).logits


def assert_same_logits(one: nn.Module, other: nn.Module) -> None:
    """To 1e-5 of the largest logit: float32 adds up more numbers in the larger model."""
    expected = logits(other)
    torch.testing.assert_close(logits(one), expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def relative_error(one: nn.Module, other: nn.Module) -> float:
    return float((logits(one) - logits(other)).norm() / logits(one).norm())


def test_the_registry_holds_the_known_growers() -> None:
    assert GROWERS.names() == ["fpi", "aki", "aki_pro", "stack", "interpolate"]
    assert set(FAMILIES) == set(MODELS)


# Function-preserving width


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden": 80, "intermediate": 40, "heads": 16, "kv_heads": 4},
        {"hidden": 80, "intermediate": 40, "heads": 16},
        {"intermediate": 25},
        {"heads": 10},
        {"hidden": 120, "intermediate": 23, "heads": 15, "kv_heads": 3},
    ],
    ids=["twice", "twice-same-kv", "ffn-5/4", "heads-5/4", "all-uneven"],
)
@pytest.mark.parametrize("family", MODELS)
def test_fpi_keeps_the_logits(family: str, sizes: dict[str, int], tied: bool) -> None:
    model = make_model(family, tie_word_embeddings=tied)
    grower, grown = grow(model, "fpi", {"require_exact": True}, **sizes)
    assert grower.contract is Contract.EXACT
    assert_same_logits(grown, model)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fpi_keeps_the_logits_with_every_bias(family: str) -> None:
    biases = {"attention_bias": True, **({"mlp_bias": True} if family == "llama" else {})}
    model = make_model(family, **biases)
    assert read_shape(model.config.to_dict()).out_bias
    _, grown = grow(model, "fpi", hidden=120, intermediate=33, heads=12)
    assert_same_logits(grown, model)


def test_attention_without_groups_grows_head_by_head() -> None:
    model = make_model("llama", num_key_value_heads=8)
    _, grown = grow(model, "fpi", heads=10, kv_heads=10)
    assert_same_logits(grown, model)
    q = grown.model.layers[0].self_attn.q_proj.weight.reshape(10, 4, 40)
    assert torch.equal(q[8:], q[:2])


def test_query_heads_grow_inside_their_group() -> None:
    """8 to 10 heads with 2 key-value heads: each group's fifth head is a copy of its own first."""
    model = make_model("llama")
    _, grown = grow(model, "fpi", heads=10)
    old = model.model.layers[1].self_attn.q_proj.weight.reshape(2, 4, 4, 40)
    new = grown.model.layers[1].self_attn.q_proj.weight.reshape(2, 5, 4, 40)
    assert torch.equal(new[:, :4], old)
    assert torch.equal(new[:, 4], old[:, 0])
    assert torch.equal(grown.model.layers[1].self_attn.k_proj.weight, model.model.layers[1].self_attn.k_proj.weight)


def test_rms_norm_is_kept_by_whole_multiples_only() -> None:
    model = make_model("llama")
    grower, grown = grow(model, "fpi", hidden=50, heads=10)
    assert grower.contract is Contract.NONE
    assert 0.005 < relative_error(model, grown) < 1
    with pytest.raises(ValueError, match="hidden=50 must be a multiple of 40"):
        grow(model, "fpi", {"require_exact": True}, hidden=50, heads=10)


def test_matrices_follow_the_formula() -> None:
    model = make_model("llama")
    state = model.state_dict()
    for name, rule in (("fpi", oracles.grow_fpi), ("aki", None)):
        _, grown = grow(model, name, hidden=56, intermediate=45)
        for part in ("gate_proj", "up_proj", "down_proj"):
            key = f"model.layers.1.mlp.{part}.weight"
            found = grown.state_dict()[key]
            own, above = state[key].tolist(), state[key.replace(".1.", ".2.")].tolist()
            wanted = rule(own, *found.shape) if rule else oracles.grow_aki(own, above, *found.shape)
            torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-6, atol=1e-7)


def test_a_grown_model_in_bfloat16_stays_bfloat16_and_exact() -> None:
    """Halving is exact in binary floating point."""
    model = make_model("llama").to(torch.bfloat16)
    grower, grown = grow(model, "fpi", hidden=80, intermediate=40, heads=16)
    state = model.state_dict()
    tensors = {name: grower.target_tensor(name, state.__getitem__) for name in grower.tensor_names()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    wide = make_model("llama")  # model.float() would keep rounded rotary frequencies
    wide.load_state_dict(state)
    assert_same_logits(grown.float(), wide)


# AKI


def test_aki_takes_new_neurons_from_the_layer_above() -> None:
    model = make_model("llama")
    _, fpi = grow(model, "fpi", hidden=80, intermediate=40, heads=16, kv_heads=4)
    grower, aki = grow(model, "aki", hidden=80, intermediate=40, heads=16, kv_heads=4)
    assert grower.contract is Contract.NONE
    same, new = fpi.state_dict(), aki.state_dict()
    for name, tensor in new.items():
        layered = "proj" in name and ".layers.2." not in name
        assert torch.equal(tensor, same[name]) == (not layered), name
    old = model.model.layers
    up = aki.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(up[:20, :40] * 2, old[0].mlp.up_proj.weight)
    torch.testing.assert_close(up[20:, 40:] * 2, old[1].mlp.up_proj.weight)
    q = aki.model.layers[0].self_attn.q_proj.weight.reshape(4, 4, 4, 80)
    torch.testing.assert_close(q[:2, :, :, :40] * 2, old[0].self_attn.q_proj.weight.reshape(2, 4, 4, 40))
    torch.testing.assert_close(q[2:, :, :, :40] * 2, old[1].self_attn.q_proj.weight.reshape(2, 4, 4, 40))
    assert 0.3 < relative_error(model, aki) < 3, "far from the source, as the paper's losses say"


def test_aki_with_more_query_heads_keeps_keys_and_values() -> None:
    model = make_model("llama")
    _, grown = grow(model, "aki", heads=10)
    old, new = model.model.layers, grown.model.layers
    q = new[0].self_attn.q_proj.weight.reshape(2, 5, 4, 40)
    assert torch.equal(q[:, :4], old[0].self_attn.q_proj.weight.reshape(2, 4, 4, 40))
    assert torch.equal(q[:, 4], old[1].self_attn.q_proj.weight.reshape(2, 4, 4, 40)[:, 0])
    for part in ("k_proj", "v_proj"):
        assert torch.equal(getattr(new[0].self_attn, part).weight, getattr(old[0].self_attn, part).weight)


def test_aki_pro_is_aki_with_interpolation() -> None:
    model = make_model("qwen2")
    sizes = {"hidden": 60, "intermediate": 30, "heads": 12, "layers": 5}
    _, pro = grow(model, "aki_pro", **sizes)
    _, aki = grow(model, "aki", {"depth": "interpolate"}, **sizes)
    _, stacked = grow(model, "aki", {"depth": "stack"}, **sizes)
    assert all(torch.equal(a, b) for a, b in zip(pro.parameters(), aki.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(pro.parameters(), stacked.parameters(), strict=True))


# Depth


def layers_of(name: str, source: int, target: int, args: dict[str, Any] | None = None) -> list[int]:
    shape = DecoderShape(8, 8, 2, 2, 4, source, 5)
    grower = GROWERS.get(name).build(args or {}, shape, dataclasses.replace(shape, layers=target))
    return [grower.source_layer(layer) for layer in range(target)]


def test_depth_rules() -> None:
    assert layers_of("stack", 3, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert layers_of("interpolate", 3, 6) == [0, 0, 1, 1, 2, 2]
    deeper = layers_of("interpolate", 32, 40)
    repeated = [layer for layer in range(32) if deeper.count(layer) == 2]
    assert repeated == list(range(0, 32, 4)), "32 to 40 repeats every fourth layer"
    assert sorted(set(deeper)) == list(range(32))
    for name in ("fpi", "aki"):
        assert layers_of(name, 3, 7, {"depth": "stack"}) == layers_of("stack", 3, 7)
        assert layers_of(name, 32, 40) == deeper
    assert layers_of("aki_pro", 32, 40) == deeper


@pytest.mark.parametrize("name", ["stack", "interpolate"])
def test_deeper_models_have_the_layers_of_the_source(name: str) -> None:
    model = make_model("qwen3")
    grower, grown = grow(model, name, layers=5)
    assert grower.contract is Contract.NONE
    for layer in range(5):
        old = model.model.layers[grower.source_layer(layer)].state_dict()
        new = grown.model.layers[layer].state_dict()
        assert all(torch.equal(new[key], old[key]) for key in old)
    assert relative_error(model, grown) > 0.01


# Every grower


@every_grower
def test_without_growth_every_grower_changes_nothing(name: str) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    grower, grown = grow(model, name)
    assert grower.contract is Contract.EXACT
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), grown.parameters(), strict=True))
    assert not {a.data_ptr() for a in model.parameters()} & {b.data_ptr() for b in grown.parameters()}


@every_grower
def test_few_source_tensors_are_read_for_one_target_tensor(name: str) -> None:
    """So that a program can stream checkpoints larger than the memory."""
    model = make_model("qwen3")
    source, state = read_shape(model.config.to_dict()), model.state_dict()
    wider = {} if name in ("stack", "interpolate") else {"hidden": 80, "intermediate": 40, "heads": 16}
    grower = GROWERS.get(name).build({}, source, dataclasses.replace(source, layers=5, **wider))
    for key, shape in grower.tensor_names().items():
        asked: list[str] = []
        tensor = grower.target_tensor(key, lambda n, asked=asked: (asked.append(n), state[n])[1])
        assert tuple(tensor.shape) == shape
        assert len(asked) <= (2 if name.startswith("aki") else 1)
        assert len({n.split(".")[-2] for n in asked}) == 1
        asked_tensor = state[asked[0]]
        tensor += 1
        assert torch.equal(asked_tensor, state[asked[0]]), "the result owns its memory"


@pytest.mark.parametrize("family", MODELS)
def test_shapes_are_those_of_transformers(family: str) -> None:
    for changes in ({}, {"tie_word_embeddings": True}, {"num_key_value_heads": 8}):
        model = make_model(family, **changes)
        shape = read_shape(model.config.to_dict())
        assert shape.num_parameters() == sum(p.numel() for p in model.parameters())
        names = family_of(model.config.to_dict()).names.entries(shape)
        found = {n: tuple(p.shape) for n, p in model.named_parameters()}
        assert {n: tuple(shape.size(axis) for axis in entry.axes) for n, entry in names.items()} == found
        if family in ("llama", "mistral"):
            numbers = (shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.head_dim, shape.layers)
            assert shape.num_parameters() == oracles.llama_parameters(*numbers, shape.vocabulary, shape.tied_head)


def test_lists_with_one_item_a_layer_grow_with_the_config() -> None:
    model = make_model("qwen2", layer_types=["full_attention", "sliding_attention", "full_attention"])
    source = read_shape(model.config.to_dict())
    grower = GROWERS.get("stack").build({}, source, dataclasses.replace(source, layers=5))
    grown = grower.grow_config(model.config.to_dict())
    assert grown["layer_types"] == [f"{kind}_attention" for kind in ("full", "sliding", "full", "full", "sliding")]
    assert grown["num_hidden_layers"] == 5


def test_grown_then_upcycled_block_equals_the_grown_one() -> None:
    """AquilaMoE's chain: scale up, then scale out."""
    _, grown = grow(make_model("llama"), "aki_pro", hidden=80, intermediate=40, heads=16, layers=5)
    spec = MlpSpec(80, 40, "silu", True, False, "gate_proj", "up_proj", "down_proj")
    block, x = grown.model.layers[3].mlp, torch.randn(9, 80)
    experts = StackedExperts.build(spec, 8, {})
    experts.load_state_dict(UPCYCLERS.get("copy").build({})(DenseMlp.read(block, spec), spec, 8, torch.Generator()))
    layer = MoELayer(make_router(("top_k", {"k": 2}), 80, 8), experts)
    torch.testing.assert_close(layer(x), block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("fpi", {"hidden": 8}, "hidden=8 must be at least 40"),
        ("fpi", {"layers": 2}, "layers=2 must be at least 3"),
        ("fpi", {"head_dim": 8}, "head_dim=8 must stay 4"),
        ("fpi", {"vocabulary": 24}, "vocabulary=24 must stay 23"),
        ("aki", {"tied_head": True}, "tied_head=True must stay False"),
        ("aki", {"kv_heads": 4}, "heads / kv_heads=2 must be at least 4"),
        ("stack", {"hidden": 80}, "changes the number of layers only, but hidden goes from 40 to 80"),
        ("interpolate", {"heads": 16}, "group goes from 4 to 8"),
    ],
)
def test_targets_that_cannot_be_made_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    source = read_shape(make_model("llama").config.to_dict())
    with pytest.raises(ValueError, match=message):
        GROWERS.get(name).build({}, source, dataclasses.replace(source, **changes))


def test_other_mistakes_are_refused() -> None:
    source = read_shape(make_model("llama").config.to_dict())
    with pytest.raises(ValueError, match="unknown depth 'stak'; did you mean 'stack'"):
        GROWERS.get("fpi").build({"depth": "stak"}, source, source)
    with pytest.raises(ValueError, match="no option 'depht'"):
        GROWERS.get("aki").build({"depht": "stack"}, source, source)
    with pytest.raises(ValueError, match="cannot grow a model of type 'gpt2'"):
        read_shape({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="no 'intermediate_size'"):
        read_shape({"model_type": "llama", "hidden_size": 8})
    with pytest.raises(ValueError, match="kv_heads=3 must divide heads=8"):
        dataclasses.replace(source, kv_heads=3)
    with pytest.raises(ValueError, match="layers=0 must be at least 1"):
        dataclasses.replace(source, layers=0)
    grower = GROWERS.get("fpi").build({}, source, source)
    with pytest.raises(ValueError, match="no tensor 'model"):
        grower.target_tensor("model.layers.9.mlp.up_proj.weight", lambda name: torch.zeros(1))
    with pytest.raises(ValueError, match=r"model.norm.weight has the shape \(3,\)"):
        grower.target_tensor("model.norm.weight", lambda name: torch.zeros(3))
