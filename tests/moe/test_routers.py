"""The contract of a router, for every registered one; and what is particular to top-k."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from llava_moe.moe import ROUTERS, Router, RoutingContext
from llava_moe.registry import RegistryError
from tests.moe.cases import HIDDEN, NUM_EXPERTS, ROUTER_CASES, case_id, make_router
from tests.reference import oracles

Case = tuple[str, dict[str, Any]]
CONVENTIONS = ("softmax_topk_renorm", "softmax_topk", "topk_softmax")
every_router = pytest.mark.parametrize("case", ROUTER_CASES, ids=case_id)


def context(num_tokens: int) -> RoutingContext:
    return RoutingContext.trivial(num_tokens)


def test_the_cases_cover_the_registry() -> None:
    assert {name for name, _ in ROUTER_CASES} == set(ROUTERS.names())
    assert {"top_k"} <= set(ROUTERS.names())
    assert len(ROUTER_CASES) >= 7


@every_router
@pytest.mark.parametrize("num_tokens", [0, 1, 11])
def test_shapes_dtypes_and_index_range(case: Case, num_tokens: int) -> None:
    routing = make_router(case)(torch.randn(num_tokens, HIDDEN), context(num_tokens))
    k = routing.index_TK.shape[1]
    assert routing.logits_TE.shape == routing.probs_TE.shape == (num_tokens, NUM_EXPERTS)
    assert routing.index_TK.shape == routing.weight_TK.shape == (num_tokens, k)
    assert routing.logits_TE.dtype == routing.probs_TE.dtype == routing.weight_TK.dtype == torch.float32
    assert routing.index_TK.dtype == torch.int64
    assert ((routing.index_TK >= 0) & (routing.index_TK <= NUM_EXPERTS)).all()
    assert routing.num_experts == NUM_EXPERTS


@every_router
def test_weights_are_shares_of_distinct_experts(case: Case) -> None:
    router = make_router(case)
    routing = router(torch.randn(40, HIDDEN), context(40))
    empty = routing.index_TK == NUM_EXPERTS
    assert (routing.weight_TK >= 0).all()
    assert (routing.weight_TK[empty] == 0).all()
    for row in routing.index_TK.tolist():
        filled = [e for e in row if e != NUM_EXPERTS]
        assert len(set(filled)) == len(filled)
    if router.normalised:
        torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(40))


@every_router
def test_evaluation_is_deterministic(case: Case) -> None:
    router, x = make_router(case).eval(), torch.randn(9, HIDDEN)
    torch.manual_seed(1)
    first = router(x, context(9))
    torch.manual_seed(2)
    second = router(x, context(9))
    for field in dataclasses.fields(first):
        assert torch.equal(getattr(first, field.name), getattr(second, field.name))


@every_router
def test_training_draws_random_numbers_only_if_declared(case: Case) -> None:
    router, x = make_router(case).train(), torch.randn(9, HIDDEN)
    state = torch.get_rng_state()
    router(x, context(9))
    if not router.stochastic:
        assert torch.equal(state, torch.get_rng_state())


@every_router
def test_tokens_are_routed_one_by_one(case: Case) -> None:
    """Permuting the tokens permutes the routing, and batch mates change nothing."""
    router = make_router(case).eval()
    if not router.token_choice:
        pytest.skip("its tokens compete")
    x, order = torch.randn(13, HIDDEN), torch.randperm(13)
    whole, shuffled = router(x, context(13)), router(x[order], context(13))
    assert torch.equal(whole.index_TK[order], shuffled.index_TK)
    torch.testing.assert_close(whole.weight_TK[order], shuffled.weight_TK, rtol=0, atol=1e-6)
    alone = router(x[4:5], context(1))
    assert torch.equal(whole.index_TK[4:5], alone.index_TK)
    torch.testing.assert_close(whole.weight_TK[4:5], alone.weight_TK, rtol=0, atol=1e-6)


@every_router
def test_later_tokens_do_not_matter_when_declared_causal_safe(case: Case) -> None:
    router = make_router(case).eval()
    if not router.causal_safe:
        pytest.skip("declared not to be causal")
    x = torch.randn(10, HIDDEN)
    changed = torch.cat([x[:6], torch.randn(4, HIDDEN) * 5])
    assert torch.equal(router(x, context(10)).index_TK[:6], router(changed, context(10)).index_TK[:6])


@every_router
def test_gradient_reaches_every_parameter_and_the_input(case: Case) -> None:
    router, x = make_router(case).train(), torch.randn(20, HIDDEN, requires_grad=True)
    routing = router(x, context(20))
    (torch.randn_like(routing.probs_TE) * routing.probs_TE).sum().backward()
    for name, parameter in [*router.named_parameters(), ("x", x)]:
        if name == "x" or parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name


@every_router
def test_state_dict_round_trip(case: Case) -> None:
    router, x = make_router(case).eval(), torch.randn(9, HIDDEN)
    other = make_router(case).eval()
    other.load_state_dict(router.state_dict())
    assert torch.equal(router(x, context(9)).weight_TK, other(x, context(9)).weight_TK)


@every_router
def test_scores_are_float32_whatever_the_input(case: Case) -> None:
    """bfloat16 hidden states and autocast lose nothing beyond the rounding of the hidden states themselves."""
    router = make_router(case).eval()
    x = torch.randn(30, HIDDEN).bfloat16()
    expected = router(x.float(), context(30))
    found = router(x, context(30))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = router(x.float(), context(30))
    for routing in (found, autocast):
        assert routing.logits_TE.dtype == routing.weight_TK.dtype == torch.float32
        assert torch.equal(routing.logits_TE, expected.logits_TE)
        assert torch.equal(routing.index_TK, expected.index_TK)
    half = router.to(torch.bfloat16)(x, context(30))
    assert half.logits_TE.dtype == half.weight_TK.dtype == torch.float32


@every_router
def test_extreme_inputs_stay_finite(case: Case) -> None:
    router = make_router(case)
    x = (torch.randn(16, HIDDEN) * 1e3).requires_grad_()
    routing = router(x, context(16))
    routing.weight_TK.square().sum().backward()
    assert torch.isfinite(routing.weight_TK).all()
    assert torch.isfinite(x.grad).all()
    zero = router(torch.zeros(3, HIDDEN), context(3))
    assert torch.isfinite(zero.weight_TK).all()


@every_router
def test_initial_parameters_come_from_the_generator(case: Case) -> None:
    router = ROUTERS.get(case[0]).build(HIDDEN, NUM_EXPERTS, case[1])
    states = []
    for seed in (3, 3, 4):
        router.reset_parameters(torch.Generator().manual_seed(seed))
        states.append({name: value.clone() for name, value in router.state_dict().items()})
    generator = torch.Generator().manual_seed(3)
    router.reset_parameters(generator)
    router.reset_parameters(generator)  # the next layer: it must not start like the first
    states.append({name: value.clone() for name, value in router.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[3][name]) for name in states[0])


@every_router
def test_unknown_option_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="no option 'kk'"):
        ROUTERS.get(case[0]).build(HIDDEN, NUM_EXPERTS, {"kk": 1})


def test_unknown_router_lists_near_misses() -> None:
    with pytest.raises(RegistryError, match="did you mean 'top_k'"):
        ROUTERS.get("topk")


@pytest.mark.parametrize("k", [0, NUM_EXPERTS + 1])
def test_impossible_k_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} must be between 1 and the {NUM_EXPERTS} experts"):
        make_router(("top_k", {"k": k}))


def test_unknown_convention_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'softmax_topk"):
        make_router(("top_k", {"convention": "softmax-topk"}))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("k", [1, 2, NUM_EXPERTS])
@pytest.mark.parametrize("bias", [False, True])
def test_top_k_equals_its_oracle(convention: str, k: int, bias: bool) -> None:
    router = make_router(("top_k", {"k": k, "convention": convention, "bias": bias}))
    x = torch.randn(12, HIDDEN)
    routing = router(x, context(12))
    index, weight, probs = oracles.top_k(
        x.double().tolist(),
        router.weight.double().tolist(),
        router.bias.double().tolist() if bias else None,
        k=k,
        convention=convention,
    )
    assert routing.index_TK.tolist() == index
    torch.testing.assert_close(routing.weight_TK, torch.tensor(weight), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.probs_TE, torch.tensor(probs), rtol=1e-5, atol=1e-6)


def routings_by_convention(k: int, x: torch.Tensor) -> dict[str, Any]:
    source = make_router(("top_k", {"k": k}))
    found = {}
    for convention in CONVENTIONS:
        router = make_router(("top_k", {"k": k, "convention": convention}))
        router.load_state_dict(source.state_dict())
        found[convention] = router(x, context(len(x)))
    return found


def test_conventions_agree_where_mathematics_says_so() -> None:
    x = torch.randn(25, HIDDEN)
    found = routings_by_convention(2, x)
    torch.testing.assert_close(
        found["softmax_topk_renorm"].weight_TK, found["topk_softmax"].weight_TK, rtol=0, atol=1e-6
    )
    assert (found["softmax_topk"].weight_TK.sum(-1) < 0.999).any()
    assert (found["softmax_topk"].weight_TK.sum(-1) <= 1 + 1e-6).all()
    everything = routings_by_convention(NUM_EXPERTS, x)
    for routing in everything.values():
        expected = routing.logits_TE.softmax(-1).gather(-1, routing.index_TK)
        torch.testing.assert_close(routing.weight_TK, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_normalised_flag_tells_the_truth(convention: str) -> None:
    router = make_router(("top_k", {"k": 2, "convention": convention}))
    assert router.normalised == (convention != "softmax_topk")
    assert Router.normalised  # the instance's flag did not leak into the class
    assert ROUTERS.get("top_k").normalised


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_task_gradient_of_the_router_at_k_1(convention: str) -> None:
    """With k = 1 and weights that sum to 1, the task loss teaches the router nothing, ever."""
    router = make_router(("top_k", {"k": 1, "convention": convention}))
    routing = router(torch.randn(20, HIDDEN), context(20))
    (routing.weight_TK * torch.randn(20, 1)).sum().backward()
    largest = router.weight.grad.abs().max()
    assert (largest > 1e-3) if convention == "softmax_topk" else (largest < 1e-6)


def test_permuting_the_experts_permutes_the_routing() -> None:
    router, x = make_router(("top_k", {"k": 2, "bias": True})), torch.randn(15, HIDDEN)
    before, order = router(x, context(15)), torch.randperm(NUM_EXPERTS)
    with torch.no_grad():
        router.weight.copy_(router.weight[order].clone())
        router.bias.copy_(router.bias[order].clone())
    after = router(x, context(15))
    assert torch.equal(order[after.index_TK], before.index_TK)
    torch.testing.assert_close(after.weight_TK, before.weight_TK)
