"""Routers that are more than a scorer and a selector: each against its oracle, in value and in gradient."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from llava_moe.moe import ROUTERS, LayerPlan, Router, Routing, RoutingContext, build_layer
from llava_moe.moe.experts.hyper import SetTables
from tests.moe.special_cases import HIDDEN, NUM_EXPERTS, SPEC, TOKENS, full_context, make
from tests.reference import oracles_special

CASES: list[tuple[str, dict[str, Any]]] = [
    ("expert_choice", {}),
    ("expert_choice", {"capacity_factor": 0.7, "group": "batch"}),
    ("expert_choice", {"capacity_factor": 1.5, "renormalise": True}),
    ("base_layer", {}),
    ("compete_smoe", {}),
    ("compete_smoe", {"k": 3}),
    ("moe_plus_plus", {}),
    ("moe_plus_plus", {"k": 1}),
    ("moe_plus_plus", {"k": 3, "scorer": "two_layer", "scorer_args": {"multiple": 2}}),
    ("tc_moe", {}),
    ("tc_moe", {"k": 4, "negative_offset": 0.5, "null_offset": 0.0}),
    ("locmoe", {}),
    ("locmoe", {"bias": True, "renormalise": True}),
    ("expert_token_resonance", {}),
    ("expert_token_resonance", {"k": 3}),
    ("hyper_moe", {"k": 1}),
    ("hyper_moe", {"k": 2}),
    ("modality", {}),
    ("modality", {"mode": "experts"}),
    ("modality", {"mode": "experts", "image_experts": 2, "router": "sigmoid", "router_args": {"k": 1}}),
    ("modality", {"router": "noisy_top_k", "router_args": {"k": 3}}),
]
every_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: "-".join([c[0], *(f"{k}={v}" for k, v in c[1].items())])
)


def as_arrays(context: RoutingContext) -> dict[str, Any]:
    fields = {f.name: getattr(context, f.name) for f in dataclasses.fields(context)}
    return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in fields.items()}


def float64_state(router: Router) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in router.state_dict().items()}


@every_case
def test_evaluation_equals_the_oracle(case: tuple[str, dict[str, Any]]) -> None:
    router, context = make(case).eval(), full_context()
    x = torch.randn(TOKENS, HIDDEN)
    routing = router(x, context)
    oracle = oracles_special.ROUTERS[case[0]]
    gates, probs = oracle(float64_state(router), router.config, x.double().numpy(), as_arrays(context))
    np.testing.assert_allclose(routing.gates_TE().detach().numpy(), gates, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(routing.probs_TE.detach().numpy(), probs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c[0] not in ("expert_token_resonance",)][::2], ids=str)
def test_gradients_are_those_of_the_oracle(case: tuple[str, dict[str, Any]]) -> None:
    """Finite differences of the float64 oracle, for a weighted sum of gates and probabilities."""
    router, context = make(case).eval(), full_context()
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    routing = router(x, context)
    pull = torch.randn(2, TOKENS, NUM_EXPERTS)
    (pull[0] * routing.gates_TE() + pull[1] * routing.probs_TE).sum().backward()
    state, arrays, tokens = float64_state(router), as_arrays(context), x.detach().double().numpy()
    oracle, pulls = oracles_special.ROUTERS[case[0]], pull.double().numpy()

    def value() -> float:
        gates, probs = oracle(state, router.config, tokens, arrays)
        return float((pulls[0] * gates + pulls[1] * probs).sum())

    learned = {name: p for name, p in router.named_parameters() if p.requires_grad}
    for name, tensor in {**learned, "x": x}.items():
        array = tokens if name == "x" else state[name]
        found = torch.zeros(array.shape) if tensor.grad is None else tensor.grad
        for place in np.random.default_rng(0).choice(array.size, size=min(4, array.size), replace=False):
            kept, step = array.flat[place], 1e-6
            array.flat[place] = kept + step
            above = value()
            array.flat[place] = kept - step
            below = value()
            array.flat[place] = kept
            assert float(found.reshape(-1)[place]) == pytest.approx((above - below) / (2 * step), rel=1e-3, abs=1e-4), (
                name
            )


@every_case
@pytest.mark.parametrize("num_tokens", [0, 1, TOKENS])
@pytest.mark.parametrize("training", [False, True])
def test_contract(case: tuple[str, dict[str, Any]], num_tokens: int, training: bool) -> None:
    router = make(case).train(training)
    context = (
        full_context(num_tokens)
        if num_tokens > 2
        else dataclasses.replace(
            RoutingContext.trivial(num_tokens), modality_T=torch.zeros(num_tokens, dtype=torch.int64)
        )
    )
    x = torch.randn(num_tokens, HIDDEN).bfloat16().requires_grad_()
    routing = router(x, context)
    num_slots = routing.index_TK.shape[1]
    assert routing.logits_TE.shape == routing.probs_TE.shape == (num_tokens, NUM_EXPERTS)
    assert routing.index_TK.shape == routing.weight_TK.shape == (num_tokens, num_slots)
    assert routing.logits_TE.dtype == routing.probs_TE.dtype == routing.weight_TK.dtype == torch.float32
    assert routing.index_TK.dtype == torch.int64
    assert set(routing.extras) == set(router.extras)
    empty = routing.index_TK == NUM_EXPERTS
    assert (routing.weight_TK[empty] == 0).all()
    assert router.signed or (routing.weight_TK >= 0).all()
    for row in routing.index_TK.tolist():
        filled = [e for e in row if e != NUM_EXPERTS]
        assert len(set(filled)) == len(filled)
    if router.normalised:
        torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(num_tokens))
    (routing.weight_TK.sum() + routing.probs_TE.square().sum()).backward()
    for name, parameter in router.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name


@every_case
def test_flags_are_true(case: tuple[str, dict[str, Any]]) -> None:
    router = make(case).train()
    x, context, state = torch.randn(TOKENS, HIDDEN), full_context(), torch.get_rng_state()
    router(x, context)
    assert router.stochastic == (not torch.equal(state, torch.get_rng_state()))
    assert router.learned == any(p.requires_grad for p in router.parameters())
    changed = torch.cat([x[:3], torch.randn(TOKENS - 3, HIDDEN) * 3])
    torch.manual_seed(0)
    before = router(x, context)
    torch.manual_seed(0)
    after = router(changed, context)
    same = torch.equal(before.index_TK[:3], after.index_TK[:3])
    assert same or not router.causal_safe
    if router.token_choice and not router.stochastic:
        order = torch.randperm(TOKENS)
        fields = {
            f.name: getattr(context, f.name)[order]
            for f in dataclasses.fields(context) if isinstance(getattr(context, f.name), Tensor)
        }  # fmt: skip
        moved = dataclasses.replace(
            context, **fields, previous=Routing(*(getattr(context.previous, n)[order] for n in (
                "logits_TE", "probs_TE", "index_TK", "weight_TK")))
        )  # fmt: skip
        torch.testing.assert_close(router(x[order], moved).gates_TE(), before.gates_TE()[order])


@every_case
def test_state_and_precision(case: tuple[str, dict[str, Any]]) -> None:
    """What is saved is all there is; float32 buffers survive a cast; routing is float32 under autocast."""
    router, other = make(case).eval(), make(case).eval()
    x, context = torch.randn(TOKENS, HIDDEN), full_context()
    other.load_state_dict(router.state_dict())
    expected = router(x, context)
    assert torch.equal(other(x, context).weight_TK, expected.weight_TK)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x, context).logits_TE, expected.logits_TE)
    half = copy.deepcopy(router).to(torch.bfloat16)
    for name in half.float32_buffers:
        assert half.get_buffer(name).dtype == torch.float32
    assert half(x.bfloat16(), context).logits_TE.dtype == torch.float32


@pytest.mark.parametrize("case", [(n, {}) for n in oracles_special.ROUTERS], ids=str)
def test_layers_learn_and_recomputation_changes_nothing(case: tuple[str, dict[str, Any]]) -> None:
    """Two layers in a row under checkpointing: same output and gradients as without."""
    experts = "special" if case[0] == "moe_plus_plus" else "stacked"
    args = {"num_constant": 0} if experts == "special" else {}
    plan = LayerPlan(4, router=case[0], router_args=case[1], experts=experts, experts_args=args)
    first = build_layer(plan, SPEC, layer=0, part="vision").train()
    second = build_layer(plan, SPEC, layer=2, part="vision", scope=first.scope).train()
    context = dataclasses.replace(full_context(), part="vision", previous=None, run_experts=None)
    first.scope.set_context(context)
    x = torch.randn(2, TOKENS // 2, HIDDEN)
    results = []
    for recompute in (False, True):
        for parameter in [*first.parameters(), *second.parameters()]:
            parameter.grad = None
        torch.manual_seed(0)
        with first.scope.recording() as routings:
            y = x
            for layer in (first, second):
                y = y + (torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=False) if recompute else layer(y))
        loss = y.square().sum() + sum(r.probs_TE.square().sum() for r in routings.values())
        loss.backward()
        grads = {f"{i}.{n}": p.grad for i, m in enumerate((first, second)) for n, p in m.named_parameters()}
        results.append((y.detach(), grads))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        assert grad is not None, name
        torch.testing.assert_close(grad, results[1][1][name], msg=name)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("expert_choice", {"capacity_factor": 0.0}, "capacity_factor=0.0 must be above 0"),
        ("expert_choice", {"group": "sequnce"}, "unknown group 'sequnce'; did you mean 'sequence'"),
        ("base_layer", {"init_gain": 0.0}, "init_gain=0.0 must be above 0"),
        ("compete_smoe", {"k": 7}, "k=7 must be between 1 and the 6 experts"),
        ("moe_plus_plus", {"scorer": "two_layers"}, "unknown scorer 'two_layers'; did you mean 'two_layer'"),
        ("moe_plus_plus", {"k": 0}, "k=0 must be between"),
        ("tc_moe", {"k": 7}, "k=7 must be between"),
        ("expert_token_resonance", {"factor": -1.0}, "factor=-1.0 must be above 0"),
        ("expert_token_resonance", {"k": 7}, "k=7 must be between"),
        ("hyper_moe", {"trunk": 0}, "trunk=0 must be at least 1"),
        ("hyper_moe", {"k": 3, "max_sets": 41}, "42 sets of at most 3 of 6 experts can be .* max_sets=41"),
        ("modality", {"mode": "expert"}, "unknown mode 'expert'; did you mean 'experts'"),
        ("modality", {"mode": "experts", "image_experts": 6}, "image_experts=6 must leave some of 6"),
        ("modality", {"image_experts": 3}, "image_experts=3 has no meaning with mode: routers"),
        ("modality", {"router": "modality"}, "router='modality' cannot be split"),
        ("modality", {"router": "compete_smoe"}, "router='compete_smoe' cannot be split"),
        ("modality", {"router": "moe_plus_plus"}, "router='moe_plus_plus' cannot be split"),
        ("modality", {"router_args": {"k": 9}}, "k=9 must be between"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ROUTERS.get(name).build(HIDDEN, NUM_EXPERTS, args)


def test_more_experts_than_dimensions_have_no_slices() -> None:
    for name in ("locmoe", "expert_token_resonance"):
        with pytest.raises(ValueError, match="9 experts need at least as many hidden dimensions; there are 8"):
            ROUTERS.get(name).build(HIDDEN, 9, {})


@pytest.mark.parametrize("case", [c for c in CASES if c[0] != "base_layer"], ids=str)
def test_the_host_needs_no_value(case: tuple[str, dict[str, Any]]) -> None:
    """Forward and backward in training on tensors without values; only BASE cannot be had without them."""
    with FakeTensorMode():
        router, x = make(case).train(), torch.randn(TOKENS, HIDDEN, requires_grad=True)
        routing = router(x, full_context())
        (routing.weight_TK.sum() + routing.probs_TE.square().sum() + routing.load_E().sum()).backward()
        side = router.side_branch(SPEC)
        if case[0] == "hyper_moe":
            tables = SetTables.make(NUM_EXPERTS, case[1]["k"], torch.device("cpu"))
            assert tables.numbers(routing.index_TK).shape == (TOKENS,)
            assert side.weights_of(tables.complement_SE, torch.float32).first_EFD.shape[1:] == (64, HIDDEN)


def test_base_layers_assignment_runs_on_the_host() -> None:
    with FakeTensorMode():
        router, x = make(("base_layer", {})), torch.randn(TOKENS, HIDDEN)
        assert router.eval()(x, full_context()).index_TK.shape == (TOKENS, 1)
        with pytest.raises(DynamicOutputShapeException):
            router.train()(x, full_context())


@pytest.mark.parametrize("name", oracles_special.ROUTERS)
def test_layers_can_be_made_on_the_meta_device_and_filled(name: str) -> None:
    """As `from_pretrained` does it: whatever is no parameter must come from the checkpoint, too."""
    plan = LayerPlan(4, router=name, experts="special" if name == "moe_plus_plus" else "stacked")
    with torch.device("meta"):
        empty = build_layer(plan, SPEC, part="vision")
    full = build_layer(plan, SPEC, part="vision").eval()
    assert all(value.is_meta for value in empty.state_dict().values())
    empty.load_state_dict(full.state_dict(), assign=True)
    context = dataclasses.replace(full_context(), part="vision", previous=None, run_experts=None)
    x = torch.randn(TOKENS, HIDDEN)
    outputs = []
    for layer in (full, empty.eval()):
        layer.scope.set_context(context)
        outputs.append(layer(x))
    assert torch.equal(*outputs)
