"""Soft MoE: a layer kind that mixes tokens into slots."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llava_moe.model.configuration import MoePart, NamedArgs
from llava_moe.model.sites import moe_layer
from llava_moe.moe import LayerPlan, RoutingContext, RoutingScope, build_layer
from llava_moe.moe.soft import SoftMoELayer
from tests.moe.cases import SPECS
from tests.reference import oracles_special


def make(num_experts: int = 3, slots: int = 2, spec: str = "gated-bias", **plan: Any) -> SoftMoELayer:
    plan = {"router": "soft_moe", "router_args": {"slots": slots}, **plan}
    layer = build_layer(LayerPlan(num_experts, **plan), SPECS[spec], layer=4, part="vision")
    assert isinstance(layer, SoftMoELayer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


def context(mask_BS: Tensor) -> RoutingContext:
    rows, tokens = mask_BS.shape
    sequence = torch.arange(rows).repeat_interleave(tokens)
    return RoutingContext(token_mask_T=mask_BS.reshape(-1), sequence_T=sequence, part="vision")


def expert_functions(layer: SoftMoELayer) -> list[Any]:
    def function(e: int) -> Any:
        def run(vector: np.ndarray) -> np.ndarray:
            x = torch.from_numpy(np.asarray(vector)).float().unsqueeze(0)
            return layer.experts(x, torch.full((1, 1), e), torch.ones(1, 1))[0].detach().double().numpy()

        return run

    return [function(e) for e in range(layer.experts.num_experts)]


@pytest.mark.parametrize(("num_experts", "slots"), [(1, 1), (3, 1), (3, 2), (2, 4)])
def test_it_follows_its_formula(num_experts: int, slots: int) -> None:
    layer = make(num_experts, slots)
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    layer.scope.set_context(context(mask))
    y = layer(x)
    phi, scale = layer.router.phi.detach().double().numpy(), layer.router.scale.item()
    for row in range(2):
        tokens, real = x[row].double().numpy(), mask[row].tolist()
        expected = oracles_special.soft_moe(tokens, phi, scale, expert_functions(layer), real)
        np.testing.assert_allclose(y[row].detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_shares_sum_to_one_over_tokens_and_over_slots() -> None:
    layer, mask = make(), torch.ones(2, 6, dtype=torch.bool)
    mask[0, :4] = False
    dispatch, combine = layer.router(torch.randn(2, 6, 8), mask)
    assert dispatch.shape == combine.shape == (2, 6, 6)
    torch.testing.assert_close(dispatch.sum(1), torch.ones(2, 6))
    torch.testing.assert_close(combine.sum(2), torch.ones(2, 6))
    assert (dispatch[0, :4] == 0).all()
    assert (dispatch[0, 4:] > 0).all()  # no token is dropped
    assert (dispatch[1] > 0).all()


def test_logits_do_not_depend_on_lengths() -> None:
    layer, x, mask = make(), torch.randn(1, 4, 8), torch.ones(1, 4, dtype=torch.bool)
    before = layer.router(x, mask)[1]
    with torch.no_grad():
        layer.router.phi.mul_(7.0)
    torch.testing.assert_close(layer.router(100 * x, mask)[1], before, rtol=1e-4, atol=1e-5)


def test_one_slot_gives_all_tokens_the_same() -> None:
    layer, x = make(1, 1), torch.randn(2, 5, 8)
    y = layer(x)
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    dispatch, _ = layer.router(x, torch.ones(2, 5, dtype=torch.bool))
    mean = (dispatch * x).sum(1)
    expected = layer.experts(mean, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    torch.testing.assert_close(y[:, 0], expected)


def test_pictures_are_not_mixed() -> None:
    layer, x = make(), torch.randn(3, 5, 8)
    y = layer(x)
    for row in range(3):
        torch.testing.assert_close(layer(x[row : row + 1])[0], y[row], rtol=1e-5, atol=1e-6)
    shape = layer(x.reshape(3, 1, 5, 8)).shape
    assert shape == (3, 1, 5, 8)


def test_padding_reaches_no_real_token() -> None:
    layer, x, mask = make(), torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    other = torch.where(mask.unsqueeze(-1), x, 50 * torch.randn(2, 6, 8))
    layer.scope.set_context(context(mask))
    y, changed = layer(x), layer(other)
    torch.testing.assert_close(y[mask], changed[mask])
    layer.scope.set_context(context(torch.ones(1, 4, dtype=torch.bool)))
    torch.testing.assert_close(layer(x[:1, :4])[0], y[0, :4], rtol=1e-5, atol=1e-6)
    mask[1] = False
    layer.scope.set_context(context(mask))
    padded = layer(x)
    assert torch.isfinite(padded).all()
    padded.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_a_flat_list_of_tokens_is_grouped_by_its_sequences() -> None:
    """Also of different lengths, and in any order."""
    layer, x = make(), torch.randn(9, 8)
    sequence = torch.tensor([7, 2, 2, 7, 2, 2, 7, 2, 2])
    mask = torch.ones(9, dtype=torch.bool)
    mask[4] = False
    given = RoutingContext(token_mask_T=mask, sequence_T=sequence, part="vision")
    layer.scope.set_context(given)
    y = layer(x)
    for number in (7, 2):
        own = sequence == number
        layer.scope.set_context(context(mask[own].unsqueeze(0)))
        torch.testing.assert_close(layer(x[own].unsqueeze(0))[0], y[own], rtol=1e-5, atol=1e-6)
    layer.scope.set_context(RoutingContext.trivial(0))
    layer.scope.set_context(dataclasses.replace(RoutingContext.trivial(0), part="vision"))
    assert layer(x[:0]).shape == (0, 8)


def test_everything_learns_and_recomputation_changes_nothing() -> None:
    layer, x = make(), torch.randn(2, 5, 8, requires_grad=True)
    layer(x).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter.grad = None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert plain[name].abs().sum() > 0, name
        torch.testing.assert_close(parameter.grad, plain[name])


def test_permuting_the_tokens_permutes_the_output() -> None:
    layer, x, order = make(), torch.randn(1, 7, 8), torch.randperm(7)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_it_records_no_routing_and_is_not_causal() -> None:
    layer, x = make(), torch.randn(1, 5, 8)
    with layer.scope.recording() as routings:
        y = layer(x)
    assert routings == {}
    assert layer.layer == 4
    assert layer.causal_safe is False
    late = torch.cat([x[:, :4], torch.randn(1, 1, 8)], dim=1)
    assert not torch.allclose(layer(late)[:, :4], y[:, :4])


def test_precision() -> None:
    layer, x = make(), torch.randn(2, 5, 8)
    expected = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        dispatch, combine = layer.router(x, torch.ones(2, 5, dtype=torch.bool))
        found = layer(x)
    assert dispatch.dtype == combine.dtype == found.dtype == torch.float32
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * scale)
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.isfinite(half).all()


def test_initial_values_and_state() -> None:
    layer = build_layer(LayerPlan(3, router="soft_moe"), SPECS["gated"], part="vision")
    assert set(layer.state_dict()) == {"router.phi", "router.scale", "experts.gate_up_proj", "experts.down_proj"}
    assert layer.router.phi.shape == (3, 1, 8)
    assert layer.router.scale.tolist() == [1.0]
    layer.router.reset_parameters(torch.Generator().manual_seed(1))
    first = layer.router.phi.clone()
    layer.router.reset_parameters(torch.Generator().manual_seed(1))
    assert torch.equal(layer.router.phi, first)


def test_other_experts_and_shared_ones() -> None:
    layer = make(experts="special", shared={"num": 1}, num_experts=2)
    x = torch.randn(2, 5, 8)
    alone = make(experts="special", num_experts=2)
    alone.load_state_dict({n: v for n, v in layer.state_dict().items() if not n.startswith("shared.")})
    torch.testing.assert_close(layer(x), layer.shared(x.reshape(-1, 8), alone(x).reshape(-1, 8)).reshape(x.shape))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"capacity": {}}, "a capacity has no meaning"),
        ({"router_args": {"slots": 0}}, "slots=0 must be at least 1"),
        ({"router_args": {"slot": 2}}, "no option 'slot'; did you mean 'slots'"),
        ({"router_args": {"slots": "two"}}, "slots='two' must be int"),
    ],
)
def test_bad_plans_are_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_layer(LayerPlan(3, router="soft_moe", **plan), SPECS["gated"])


def test_a_decoder_takes_it_only_where_that_is_asked_for() -> None:
    part = MoePart(layers=(0,), num_experts=(3,), router=NamedArgs("soft_moe"))
    with pytest.raises(ValueError, match="router 'soft_moe' looks at later tokens and cannot be used in a decoder"):
        moe_layer(part, SPECS["gated"], 3, 0, "decoder", RoutingScope())
    admitted = dataclasses.replace(part, allow_noncausal=True)
    assert isinstance(moe_layer(admitted, SPECS["gated"], 3, 0, "decoder", RoutingScope()), SoftMoELayer)
    assert isinstance(moe_layer(part, SPECS["gated"], 3, 0, "vision", RoutingScope()), SoftMoELayer)


def test_a_projector_may_have_it() -> None:
    spec = dataclasses.replace(SPECS["plain-bias"], out=5)
    layer = build_layer(LayerPlan(3, router="soft_moe"), spec, part="projector")
    assert layer(torch.randn(2, 4, 8)).shape == (2, 4, 5)
