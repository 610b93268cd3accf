"""The contract of a router, for every registered one. What is declared absent is tested to be absent."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llava_moe.moe import ROUTERS, Router, Routing, RoutingContext
from llava_moe.registry import RegistryError
from tests.moe.cases import (
    HIDDEN,
    NUM_EXPERTS,
    ROUTER_CASES,
    Case,
    case_id,
    context_for,
    full_context,
    make_router,
    padded,
    part_for,
    take,
)

every_router = pytest.mark.parametrize("case", ROUTER_CASES, ids=case_id)
every_name = pytest.mark.parametrize("name", ROUTERS.names())

# Declared facts that no flag tells. Their start does not depend on the generator: zeros, a table of a fixed seed,
# directions that are the method.
FIXED_START = {"noisy_top_k", "hyper_moe", "hash", "locmoe", "expert_token_resonance"}
# Their scores do not come from one row for each expert.
CANNOT_TIE = {"hyper_router", "random", "hash", "locmoe", "expert_token_resonance"}
CANNOT_TIE |= {"base_layer", "modality", "moe_plus_plus", "tc_moe"}
# Slots may stay empty: the number of experts of a token varies, or some of them are not real.
VARIABLE_K = {"remoe", "top_p", "tc_moe", "expert_choice", "expert_token_resonance"}
# What makes a router of one expert, where `k` alone does not.
ONE_EXPERT: dict[str, dict[str, Any]] = {
    "scored": {"selector_args": {"k": 1}},
    "modality": {"router_args": {"k": 1}},
}


def tensors(routing: Routing) -> list[Tensor]:
    fields = [routing.logits_TE, routing.probs_TE, routing.index_TK, routing.weight_TK]
    return fields + [routing.extras[name] for name in sorted(routing.extras)]


def assert_same(one: Routing, two: Routing) -> None:
    for first, second in zip(tensors(one), tensors(two), strict=True):
        assert torch.equal(first, second)


def modes(router: Router) -> list[bool]:
    """The modes in which two equal calls give equal routings."""
    return [False] if router.stochastic else [False, True]


def differs(
    router: Router, one: tuple[Tensor, RoutingContext], two: tuple[Tensor, RoutingContext], rows: Tensor
) -> bool:
    """Whether these rows of the first call have other gates than the first rows of the second one, in training."""
    first = router.train()(*one).gates_TE()[rows]
    second = router.train()(*two).gates_TE()[: len(rows)]
    return not torch.allclose(first, second, atol=1e-6)


def test_the_cases_cover_the_registry() -> None:
    assert {name for name, _ in ROUTER_CASES} == set(ROUTERS.names())
    assert {"top_k", "scored", "noisy_top_k", "sigmoid", "deepseek_v3", "remoe", "hash"} <= set(ROUTERS.names())
    assert len(ROUTER_CASES) >= 40
    assert ROUTERS.get("top_k").normalised, "an instance's flag leaked into the class"


@every_router
@pytest.mark.parametrize("num_tokens", [0, 1, 11])
def test_shapes_dtypes_and_index_range(case: Case, num_tokens: int) -> None:
    router = make_router(case)
    for training in (False, True):
        routing = router.train(training)(torch.randn(num_tokens, HIDDEN), context_for(case, num_tokens))
        assert routing.logits_TE.shape == routing.probs_TE.shape == (num_tokens, NUM_EXPERTS)
        assert routing.index_TK.shape == routing.weight_TK.shape == (num_tokens, routing.index_TK.shape[1])
        assert routing.logits_TE.dtype == routing.probs_TE.dtype == routing.weight_TK.dtype == torch.float32
        assert routing.index_TK.dtype == torch.int64
        assert ((routing.index_TK >= 0) & (routing.index_TK <= NUM_EXPERTS)).all()
        assert routing.num_experts == NUM_EXPERTS


@every_router
def test_extras_are_those_declared(case: Case) -> None:
    router = make_router(case)
    assert len(set(router.extras)) == len(router.extras)
    for training in (False, True):
        routing = router.train(training)(torch.randn(6, HIDDEN), context_for(case, 6))
        assert set(routing.extras) == set(router.extras)
        for name, value in routing.extras.items():
            letters = name.rpartition("_")[2]
            sizes = {"T": 6, "E": NUM_EXPERTS, "K": routing.index_TK.shape[1], "D": HIDDEN}
            assert value.shape == tuple(sizes[letter] for letter in letters), name


@every_router
def test_weights_are_of_distinct_experts_and_as_declared(case: Case) -> None:
    router, sums = make_router(case), []
    for training in (False, True):
        routing = router.train(training)(torch.randn(60, HIDDEN), context_for(case, 60))
        empty = routing.index_TK == NUM_EXPERTS
        assert (routing.weight_TK[empty] == 0).all()
        for row in routing.index_TK.tolist():
            filled = [e for e in row if e != NUM_EXPERTS]
            assert len(set(filled)) == len(filled)
        assert router.signed == bool((routing.weight_TK < 0).any())
        sums.append(routing.weight_TK.sum(-1))
    # A router that is not normalised misses the sum of 1 for some token in one of the modes.
    assert router.normalised == torch.allclose(torch.cat(sums), torch.ones(120), atol=1e-5)


@every_router
def test_evaluation_is_deterministic(case: Case) -> None:
    router, x = make_router(case).eval(), torch.randn(9, HIDDEN)
    torch.manual_seed(1)
    first = router(x, context_for(case, 9))
    torch.manual_seed(2)
    assert_same(first, router(x, context_for(case, 9)))


@every_router
def test_training_is_random_exactly_if_declared(case: Case) -> None:
    router, x = make_router(case).train(), torch.randn(9, HIDDEN)
    runs = []
    for seed in range(40):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        runs.append(router(x, context_for(case, 9)))
        assert torch.equal(before, torch.get_rng_state()) != router.stochastic
        if len(runs) > 1 and not (router.stochastic and torch.equal(runs[-1].gates_TE(), runs[0].gates_TE())):
            break
    if router.stochastic:
        assert any(not torch.equal(run.gates_TE(), runs[0].gates_TE()) for run in runs)
        torch.manual_seed(0)
        assert_same(runs[0], router(x, context_for(case, 9)))
    else:
        assert_same(runs[0], runs[1])


@every_router
def test_tokens_are_routed_one_by_one_exactly_if_declared(case: Case) -> None:
    """Permuting the tokens permutes the routing and batch mates change nothing; or they do, as declared."""
    router, x, context = make_router(case), torch.randn(14, HIDDEN), context_for(case, 14)
    if not router.token_choice:
        some = torch.arange(0, 14, 2)
        draws = [torch.randn(14, HIDDEN) for _ in range(10)]
        assert any(differs(router, (rows, context), (rows[some], take(context, some)), some) for rows in draws)
        return
    for training in modes(router):
        whole = router.train(training)(x, context)
        for chosen in (torch.randperm(14), torch.tensor([4])):
            found = router(x[chosen], take(context, chosen))
            assert torch.equal(whole.index_TK[chosen], found.index_TK)
            torch.testing.assert_close(whole.weight_TK[chosen], found.weight_TK, rtol=1e-5, atol=1e-6)


@every_router
def test_later_tokens_matter_exactly_if_declared(case: Case) -> None:
    router, x = make_router(case), torch.randn(12, HIDDEN)
    context = dataclasses.replace(context_for(case, 12), sequence_T=torch.zeros(12, dtype=torch.int64))
    changed = torch.cat([x[:6], torch.randn(6, HIDDEN) * 5])
    if not router.causal_safe:
        others = [torch.cat([x[:6], torch.randn(6, HIDDEN) * 5]) for _ in range(10)]
        assert any(differs(router, (x, context), (rows, context), torch.arange(6)) for rows in others)
        return
    for training in modes(router):
        before, after = (router.train(training)(rows, context) for rows in (x, changed))
        assert torch.equal(before.index_TK[:6], after.index_TK[:6])
        assert torch.equal(before.weight_TK[:6], after.weight_TK[:6])


@every_router
def test_padding_changes_nothing_for_real_tokens(case: Case) -> None:
    router, x, context = make_router(case), torch.randn(10, HIDDEN), context_for(case, 10)
    more = torch.cat([x, torch.randn(5, HIDDEN) * 20])
    for training in modes(router):
        alone, with_pads = router.train(training)(x, context), router(more, padded(context, 5))
        torch.testing.assert_close(with_pads.gates_TE()[:10], alone.gates_TE(), rtol=1e-5, atol=1e-6)
        if router.token_choice:
            assert torch.equal(with_pads.index_TK[:10], alone.index_TK)


@every_router
def test_only_what_is_declared_is_read(case: Case) -> None:
    router, x, context = make_router(case), torch.randn(9, HIDDEN), context_for(case, 9)
    full = full_context(9, part=part_for(case))
    usual = router.eval()(x, full)
    for name in ("token_ids_T", "modality_T"):
        other = dataclasses.replace(full, **{name: 1 - getattr(full, name)})
        if name in router.needs:
            assert not torch.equal(router(x, other).gates_TE(), usual.gates_TE()), name
        elif (case[0], name) != ("hash", "modality_T"):  # read where it is known
            assert_same(router(x, dataclasses.replace(full, **{name: None})), usual)

    def refuse(x_TD: Tensor) -> Tensor:
        raise AssertionError("the experts were run")

    for training in modes(router):
        usual = router.train(training)(x, context)
        if not router.needs_experts:
            assert_same(router(x, dataclasses.replace(context, run_experts=refuse)), usual)
        without = router(x, dataclasses.replace(context, previous=None))
        assert torch.equal(without.logits_TE, usual.logits_TE) != router.needs_previous


def with_k(name: str, k: int) -> dict[str, Any]:
    """The options with which a router uses k experts."""
    return {"k": k} if "k" in {field.name for field in dataclasses.fields(ROUTERS.get(name).Config)} else {}


@every_name
def test_one_expert(name: str) -> None:
    case = (name, {**with_k(name, 1), **ONE_EXPERT.get(name, {})})
    router = make_router(case, num_experts=1)
    for training in (False, True):
        routing = router.train(training)(torch.randn(7, HIDDEN), context_for(case, 7, num_experts=1))
        assert routing.logits_TE.shape == (7, 1)
        assert torch.isfinite(routing.weight_TK).all()
        if router.normalised:
            torch.testing.assert_close(routing.gates_TE(), torch.ones(7, 1))


@every_name
def test_all_experts(name: str) -> None:
    case = (name, with_k(name, NUM_EXPERTS))
    routing = make_router(case).eval()(torch.randn(7, HIDDEN), context_for(case, 7))
    load_E = routing.load_E()
    if name in VARIABLE_K:
        assert 0 < load_E.sum() <= 7 * NUM_EXPERTS
    else:
        assert (load_E == 7).all() == (name == "dense" or "k" in case[1])


@every_router
def test_gradient_reaches_every_parameter_and_the_input(case: Case) -> None:
    router, x = make_router(case).train(), torch.randn(20, HIDDEN, requires_grad=True)
    learning = {name: p for name, p in router.named_parameters() if p.requires_grad}
    assert router.learned == bool(learning)
    routing = router(x, context_for(case, 20))
    total = sum((torch.randn_like(value) * value).sum() for value in (routing.probs_TE, routing.weight_TK))
    if not total.requires_grad:
        assert not router.learned
        return
    total.backward()
    for name, parameter in {**learning, "x": x}.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@every_router
def test_recomputation_gives_the_same_gradients(case: Case) -> None:
    router, x = make_router(case).train(), torch.randn(12, HIDDEN, requires_grad=True)
    context, scale = context_for(case, 12), torch.randn(12, NUM_EXPERTS)

    def total(x_TD: Tensor) -> Tensor:
        routing = router(x_TD, context)
        return ((routing.gates_TE() + routing.probs_TE) * scale).sum()

    gradients = []
    for recompute in (False, True):
        torch.manual_seed(5)
        leaves = [x, *(p for p in router.parameters() if p.requires_grad)]
        value = checkpoint(total, x, use_reentrant=False) if recompute else total(x)
        if not value.requires_grad:
            assert not router.learned
            return
        gradients.append(torch.autograd.grad(value, leaves, allow_unused=not router.learned))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True) if pair[0] is not None)


@every_router
def test_state_dict_round_trip(case: Case) -> None:
    router, x = make_router(case).eval(), torch.randn(9, HIDDEN)
    other = make_router(case).eval()
    other.load_state_dict(router.state_dict())
    assert_same(router(x, context_for(case, 9)), other(x, context_for(case, 9)))


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
    same = [all(torch.equal(states[0][name], state[name]) for name in states[0]) for state in states[1:]]
    assert same[0]
    if same[1] or same[2]:
        assert case[0] in FIXED_START, "starts alike in every layer"
        assert same == [True, True, True]


@every_name
def test_tied_rows_score_alike(name: str) -> None:
    router, x = make_router((name, {}), num_experts=6), torch.randn(9, HIDDEN)
    if name in CANNOT_TIE:
        with pytest.raises(ValueError, match="could be tied"):
            router.tie_rows(3)
        return
    router.tie_rows(3)
    context = dataclasses.replace(context_for((name, {}), 9, num_experts=6), previous=None)
    logits = router.eval()(x, context).logits_TE
    assert torch.equal(logits[:, :3], logits[:, :1].expand(-1, 3))
    assert torch.equal(logits[:, 3:], logits[:, 3:4].expand(-1, 3))
    assert not torch.allclose(logits[:, 0], logits[:, 3])
    with pytest.raises(ValueError, match="cannot be tied in groups of 4"):
        router.tie_rows(4)


@every_router
def test_active_experts_is_a_number_of_experts(case: Case) -> None:
    router = make_router(case).eval()
    assert 0 < router.active_experts <= NUM_EXPERTS
    filled = router(torch.randn(40, HIDDEN), context_for(case, 40)).load_E().sum() / 40
    assert filled <= router.active_experts + 1e-6 or case[0] in VARIABLE_K


@every_router
def test_unknown_option_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="no option 'kk'"):
        ROUTERS.get(case[0]).build(HIDDEN, NUM_EXPERTS, {"kk": 1})


def test_unknown_router_lists_near_misses() -> None:
    with pytest.raises(RegistryError, match="did you mean 'top_k'"):
        ROUTERS.get("topk")
