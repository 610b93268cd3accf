"""Balance losses: the contract that every registered one is held to, its oracle, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_moe.moe import BALANCE_LOSSES, ROUTERS, Routing, RoutingContext
from tests.moe.cases import golden_routing
from tests.moe.loss_cases import (
    BALANCING,
    NUM_EXPERTS,
    SWITCH_LIKE,
    by_default,
    context_of,
    every_case,
    make_loss,
    oracle,
    routing_of,
)


def test_the_registry_holds_the_known_losses() -> None:
    known = {
        "switch", "z", "gshard", "sequence", "global_batch", "heterogeneous", "importance_load", "entropy", "max_z",
        "localised", "locality", "relu_l1", "competition", "diversity", "null_reward",
    }  # fmt: skip
    assert known <= set(BALANCE_LOSSES.names())


@every_case
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_equals_its_oracle(case: tuple[str, dict[str, Any]], empty: bool, padding: bool) -> None:
    logits = torch.randn(12, NUM_EXPERTS) * 2
    index = logits.topk(2, dim=-1).indices
    if empty:
        index = torch.where(torch.rand(12, 2) < 0.3, NUM_EXPERTS, index)
    routing = routing_of(logits, index=index)
    context = context_of(12, torch.arange(12) < (7 if padding else 12))
    assert float(make_loss(case)(routing, context)) == pytest.approx(oracle(case, routing, context), rel=1e-5)


@every_case
def test_is_a_float32_scalar_with_a_finite_gradient(case: tuple[str, dict[str, Any]]) -> None:
    logits = torch.randn(9, NUM_EXPERTS, requires_grad=True)
    loss = make_loss(case)(routing_of(logits), context_of(9))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0


@every_case
def test_padding_does_not_count(case: tuple[str, dict[str, Any]]) -> None:
    """Appending masked tokens, of whatever content, changes neither the value nor the gradient."""
    real = torch.randn(7, NUM_EXPERTS)
    values, gradients = [], []
    for num_pads in (0, 5):
        logits = torch.cat([real, torch.randn(num_pads, NUM_EXPERTS) * 30]).requires_grad_()
        loss = make_loss(case)(routing_of(logits), context_of(7 + num_pads, torch.arange(7 + num_pads) < 7))
        loss.backward()
        values.append(loss.detach())
        gradients.append(logits.grad[:7])
        assert (logits.grad[7:] == 0).all()
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@every_case
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_batch_of_padding_alone_is_finite(case: tuple[str, dict[str, Any]], num_tokens: int) -> None:
    logits = torch.randn(num_tokens, NUM_EXPERTS, requires_grad=True)
    nothing = torch.zeros(num_tokens, dtype=torch.bool)
    loss = make_loss(case)(routing_of(logits), context_of(num_tokens, nothing))
    loss.backward()
    assert float(loss.detach()) == 0
    assert (logits.grad == 0).all()


@every_case
def test_order_of_tokens_does_not_matter(case: tuple[str, dict[str, Any]]) -> None:
    routing, context, order = routing_of(torch.randn(8, NUM_EXPERTS)), context_of(8), torch.randperm(8)
    extras = {k: v if k.endswith("_E") and v.ndim == 1 else v[order] for k, v in routing.extras.items()}
    fields = (routing.logits_TE, routing.probs_TE, routing.index_TK, routing.weight_TK)
    shuffled = Routing(*(t[order] for t in fields), extras=extras)
    there = RoutingContext(context.token_mask_T[order], context.sequence_T[order], context.modality_T[order])
    torch.testing.assert_close(make_loss(case)(routing, context), make_loss(case)(shuffled, there))


@every_case
def test_gradcheck(case: tuple[str, dict[str, Any]]) -> None:
    logits = (torch.randn(5, NUM_EXPERTS, dtype=torch.float64) * 2).requires_grad_()
    index, mask = routing_of(logits.detach()).index_TK, torch.tensor([True, True, False, True, True])

    def loss(logits: Tensor) -> Tensor:
        return make_loss(case)(routing_of(logits, index=index), context_of(5, mask))

    # counts and gates are float32, so the values are known to 1e-7 only
    assert torch.autograd.gradcheck(loss, logits, eps=2e-3, atol=1e-3)


@every_case
def test_never_reads_a_value_on_the_host(case: tuple[str, dict[str, Any]]) -> None:
    """On a GPU that would make the host wait; tensors of the meta device have shapes and no values to read."""
    loss = make_loss(case)
    with torch.device("meta"):
        logits = torch.randn(8, NUM_EXPERTS, requires_grad=True)
        for _ in range(2):  # the second time with what was kept of the first
            loss(routing_of(logits), context_of(8, device="meta")).backward()
        assert logits.grad.shape == (8, NUM_EXPERTS)


@pytest.mark.parametrize("name", BALANCING)
def test_pushes_the_overloaded_expert_down(name: str) -> None:
    logits = (torch.tensor([1.0, 0.5, 0.0]) + 0.01 * torch.randn(30, 3)).requires_grad_()
    routing = routing_of(logits, k=1)
    routing = dataclasses.replace(routing, extras={**routing.extras, "zero_compute_E": torch.zeros(3).bool()})
    by_default(name)(routing, RoutingContext.trivial(30)).backward()
    assert (logits.grad[:, 0] > 0).all()
    if name != "relu_l1":  # the other gates are closed
        assert (logits.grad[:, 2] < 0).all()


@pytest.mark.parametrize("name", SWITCH_LIKE)
def test_counts_have_no_gradient(name: str) -> None:
    """f is a count: only the probabilities carry a gradient, the combine weights and logits none."""
    golden = golden_routing()
    leaves = Routing(
        *(t.clone().requires_grad_() for t in (golden.logits_TE, golden.probs_TE)),
        golden.index_TK,
        golden.weight_TK.clone().requires_grad_(),
        {"zero_compute_E": torch.zeros(3).bool()},
    )
    by_default(name)(leaves, RoutingContext.trivial(4)).backward()
    counts = torch.tensor([2.0, 1, 1] if name == "gshard" else [2.0, 4, 2])
    scale = 1 if name == "heterogeneous" else 3
    torch.testing.assert_close(leaves.probs_TE.grad, (scale * counts / counts.sum() / 4).expand(4, 3))
    assert leaves.weight_TK.grad is None
    assert leaves.logits_TE.grad is None


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("switch", {"per": "tokens"}, "unknown per='tokens'; did you mean 'token'"),
        ("sequence", {"scores": "prob"}, "unknown scores='prob'; did you mean 'probs'"),
        ("heterogeneous", {"tau": 0.0}, r"tau=0\.0 must be above 0"),
        ("heterogeneous", {"tau": 1.5}, r"tau=1\.5 must be above 0 and at most 1"),
        ("localised", {"delta": 1.0}, r"delta=1\.0 must be at least 0 and below 1"),
        ("locality", {}, "needs the option 'num_nodes'"),
        ("locality", {"num_nodes": 1}, "num_nodes=1 must be at least 2"),
        ("locality", {"num_nodes": 2, "epsilon": 0.0}, r"epsilon=0\.0 must be between 0 and 1"),
        ("relu_l1", {"k": 0}, "k=0 must be at least 1"),
        ("z", {"k": 1}, "has no option 'k'"),
    ],
)
def test_bad_options(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BALANCE_LOSSES.get(name).build(args)


@pytest.mark.parametrize("name", BALANCE_LOSSES.names())
def test_a_router_without_the_extras_is_refused_by_name(name: str) -> None:
    loss, router = by_default(name), ROUTERS.get("top_k").build(8, 4, {})
    if not loss.requires:
        loss.check(router)
        return
    with pytest.raises(ValueError, match=rf"needs '{loss.requires[0]}', which TopKRouter does not provide"):
        loss.check(router)
    routing = Routing(*(torch.zeros(2, 4) for _ in range(2)), torch.zeros(2, 1).long(), torch.ones(2, 1))
    with pytest.raises(ValueError, match="this router does not provide"):
        loss(routing, context_of(2))


@pytest.mark.parametrize("name", [name for name in BALANCE_LOSSES.names() if BALANCE_LOSSES.get(name).requires])
def test_the_routers_that_an_error_recommends_will_do(name: str) -> None:
    loss = by_default(name)
    assert loss.provided_by
    for router in loss.provided_by:
        loss.check(ROUTERS.get(router).build(8, 4, {}))


def test_locality_refuses_experts_that_nodes_cannot_share() -> None:
    with pytest.raises(ValueError, match="num_nodes=3 must divide the 4 experts"):
        make_loss(("locality", {"num_nodes": 3})).check(ROUTERS.get("top_k").build(8, 4, {}))


def test_load_counts_filled_slots_of_real_tokens() -> None:
    routing = dataclasses.replace(golden_routing(), index_TK=torch.tensor([[0, 3], [1, 1], [2, 0], [0, 1]]))
    assert routing.load_E().tolist() == [3, 3, 1]
    assert routing.load_E(torch.tensor([True, True, False, False])).tolist() == [1, 2, 0]
