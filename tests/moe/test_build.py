"""Options, whole layers from names, shared experts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from llava_moe.moe import LayerPlan, MoELayer, RoutingScope, SharedExperts, StackedExperts, build_layer
from llava_moe.moe.routers.top_k import TopKRouter
from llava_moe.moe.upcycling import Copy, DenseMlp
from llava_moe.registry import RegistryError
from tests.moe.cases import SPECS


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"num_experts": 2, "router_args": {"k": 3}}, "k=3 must be between 1 and the 2 experts"),
        ({"num_experts": 4, "router_args": {"k": "two"}}, "k='two' must be int"),
        ({"num_experts": 4, "router_args": {"k": True}}, "k=True must be int"),
        ({"num_experts": 4, "router_args": {"bias": 1}}, "bias=1 must be bool"),
        ({"num_experts": 4, "router_args": {"kk": 1}}, "no option 'kk'; did you mean 'k'"),
        ({"num_experts": 4, "experts_args": {"kernal": "loop"}}, "no option 'kernal'; did you mean 'kernel'"),
        ({"num_experts": 4, "expert_width": 0}, "expert_width=0"),
        ({"num_experts": 4, "shared": {"mix": "summ"}}, "unknown mix 'summ'"),
        ({"num_experts": 4, "shared": {"num": 0}}, "num=0"),
        ({"num_experts": 4, "capacity": {"factr": 1.0}}, "no option 'factr'"),
        ({"num_experts": 4, "capacity": {"tau": 0.75}}, "does not tell apart; use the router moe_plus_plus"),
        (
            {"num_experts": 4, "router": "hash", "router_args": {"by": "position"}},
            "by='position' cannot be used in a dec",
        ),
    ],
)
def test_bad_plans_are_refused_at_construction(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_layer(LayerPlan(**plan), SPECS["gated"])


@pytest.mark.parametrize(("field", "name"), [("router", "topk"), ("experts", "stakced")])
def test_unknown_names(field: str, name: str) -> None:
    with pytest.raises(RegistryError, match=f"unknown {field} '{name}'; did you mean"):
        build_layer(LayerPlan(num_experts=4, **{field: name}), SPECS["gated"])


def test_an_int_passes_for_a_float() -> None:
    assert TopKRouter.build(8, 4, {"init_std": 1}).config.init_std == 1


def test_router_and_experts_must_agree() -> None:
    with pytest.raises(ValueError, match="the router knows 3 experts, but there are 4"):
        MoELayer(TopKRouter.build(8, 3, {}), StackedExperts(SPECS["gated"], 4))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("mix", ["sum", "gated", "mean"])
def test_shared_experts_follow_their_formula(spec: str, mix: str) -> None:
    shared = SharedExperts.build(SPECS[spec], {"mix": mix, "num": 2})
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.normal_(std=0.5)
    hidden = SPECS[spec].hidden
    x, routed = torch.randn(7, hidden), torch.randn(7, hidden)
    assert shared.spec.intermediate == 2 * SPECS[spec].intermediate
    alone = shared.block(x, torch.zeros(7, 1, dtype=torch.int64), torch.ones(7, 1))
    gate = torch.sigmoid(x @ shared.gate.t()) if mix == "gated" else 1.0
    expected = (alone + routed) / 2 if mix == "mean" else gate * alone + routed
    torch.testing.assert_close(shared(x, routed), expected)


def test_mean_of_copies_is_the_dense_block() -> None:
    spec = SPECS["gated"]
    block = nn.ModuleDict({n: nn.Linear(8, 12, bias=False) for n in ("gate_proj", "up_proj")})
    block["down_proj"] = nn.Linear(12, 8, bias=False)
    layer = build_layer(LayerPlan(num_experts=3, shared={"mix": "mean"}), spec)
    dense, generator = DenseMlp.read(block, spec), torch.Generator().manual_seed(0)
    upcycler = Copy.build({})
    layer.experts.load_state_dict(upcycler(dense, spec, 3, generator))
    layer.shared.block.load_state_dict(upcycler(dense, spec, 1, generator))
    x = torch.randn(11, 8)
    expected = block["down_proj"](nn.functional.silu(block["gate_proj"](x)) * block["up_proj"](x))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


def test_layers_can_be_copied_and_pickled_after_a_forward() -> None:
    layer = build_layer(LayerPlan(num_experts=3), SPECS["gated"], scope=RoutingScope())
    x = torch.randn(5, 8)
    with layer.scope.recording():
        expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
        assert twin.scope is not layer.scope
