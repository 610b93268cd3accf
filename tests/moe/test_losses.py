"""Balance losses: worked numbers, the contract for every registered one, and who gets which gradient."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llava_moe.moe import BALANCE_LOSSES, Routing, RoutingContext
from tests.moe.cases import HIDDEN, NUM_EXPERTS, golden_routing, make_router
from tests.reference import oracles

every_loss = pytest.mark.parametrize("name", BALANCE_LOSSES.names())


def routing_of(logits: Tensor, k: int = 2) -> Routing:
    probs = logits.softmax(-1)
    weight, index = probs.topk(k, dim=-1)
    return Routing(logits, probs, index, weight)


def masked(mask: Tensor) -> RoutingContext:
    return dataclasses.replace(RoutingContext.trivial(len(mask)), token_mask_T=mask)


def test_the_registry_holds_the_known_losses() -> None:
    assert {"switch", "z"} <= set(BALANCE_LOSSES.names())


def test_golden_numbers() -> None:
    routing, context = golden_routing(), RoutingContext.trivial(4)
    assert float(BALANCE_LOSSES.get("switch")(routing, context)) == pytest.approx(0.99375, abs=1e-6)
    assert float(BALANCE_LOSSES.get("z")(routing, context)) == pytest.approx(0.0, abs=1e-10)


def test_switch_at_its_two_ends() -> None:
    switch, context = BALANCE_LOSSES.get("switch"), RoutingContext.trivial(12)
    uniform = routing_of(torch.zeros(12, 4))
    assert float(switch(uniform, context)) == pytest.approx(1.0, abs=1e-6)
    one_for_all = routing_of(torch.tensor([40.0, 0, 0, 0]).repeat(12, 1), k=1)
    assert float(switch(one_for_all, context)) == pytest.approx(4.0, abs=1e-5)
    lopsided = routing_of(torch.tensor([2.0, 1.0, 0, 0]).repeat(12, 1))
    assert float(switch(lopsided, context)) > 1.2


def test_switch_equals_transformers_up_to_its_missing_1_over_k() -> None:
    layers = [torch.randn(14, NUM_EXPERTS), torch.randn(14, NUM_EXPERTS)]
    for logits in layers:
        theirs = load_balancing_loss_func((logits,), NUM_EXPERTS, 2)
        ours = BALANCE_LOSSES.get("switch")(routing_of(logits), RoutingContext.trivial(14))
        torch.testing.assert_close(ours * 2, theirs)


@every_loss
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_equals_its_oracle(name: str, empty: bool, padding: bool) -> None:
    routing = routing_of(torch.randn(10, NUM_EXPERTS) * 2)
    if empty:
        routing = dataclasses.replace(
            routing, index_TK=torch.where(torch.rand(10, 2) < 0.3, NUM_EXPERTS, routing.index_TK)
        )
    mask = torch.arange(10) < (6 if padding else 10)
    expected = oracles.BALANCE_LOSSES[name](
        routing.logits_TE.tolist(), routing.probs_TE.tolist(), routing.index_TK.tolist(), mask.tolist()
    )
    assert float(BALANCE_LOSSES.get(name)(routing, masked(mask))) == pytest.approx(expected, rel=1e-5)


@every_loss
def test_is_a_float32_scalar_with_a_finite_gradient(name: str) -> None:
    router = make_router(("top_k", {}))
    context = RoutingContext.trivial(9)
    loss = BALANCE_LOSSES.get(name)(router(torch.randn(9, HIDDEN).bfloat16(), context), context)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(router.weight.grad).all()
    assert router.weight.grad.abs().sum() > 0


@every_loss
def test_padding_does_not_count(name: str) -> None:
    """Appending masked tokens, of whatever content, changes neither the value nor the gradient."""
    real = torch.randn(7, NUM_EXPERTS)
    values, gradients = [], []
    for num_pads in (0, 5):
        logits = torch.cat([real, torch.randn(num_pads, NUM_EXPERTS) * 30]).requires_grad_()
        loss = BALANCE_LOSSES.get(name)(routing_of(logits), masked(torch.arange(7 + num_pads) < 7))
        loss.backward()
        values.append(loss.detach())
        gradients.append(logits.grad[:7])
        assert (logits.grad[7:] == 0).all()
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@every_loss
def test_a_batch_of_padding_alone_is_finite(name: str) -> None:
    logits = torch.randn(3, NUM_EXPERTS, requires_grad=True)
    loss = BALANCE_LOSSES.get(name)(routing_of(logits), masked(torch.zeros(3, dtype=torch.bool)))
    loss.backward()
    assert float(loss.detach()) == 0
    assert (logits.grad == 0).all()


@every_loss
def test_order_of_tokens_does_not_matter(name: str) -> None:
    logits, order = torch.randn(8, NUM_EXPERTS), torch.randperm(8)
    context = RoutingContext.trivial(8)
    one, two = (BALANCE_LOSSES.get(name)(routing_of(rows), context) for rows in (logits, logits[order]))
    torch.testing.assert_close(one, two)


@every_loss
def test_gradcheck(name: str) -> None:
    logits = (torch.randn(4, 3, dtype=torch.float64) * 2).requires_grad_()
    index = routing_of(logits.detach()).index_TK
    mask = torch.tensor([True, True, False, True])

    def loss(logits: Tensor) -> Tensor:
        probs = logits.softmax(-1)
        return BALANCE_LOSSES.get(name)(Routing(logits, probs, index, probs.gather(-1, index)), masked(mask))

    # switch counts slots in float32, so its value is known to 1e-7 only
    assert torch.autograd.gradcheck(loss, logits, eps=1e-4, atol=1e-3)


def test_switch_pushes_the_overloaded_expert_down() -> None:
    logits = (torch.tensor([1.0, 0.5, 0.0]) + 0.01 * torch.randn(30, 3)).requires_grad_()
    BALANCE_LOSSES.get("switch")(routing_of(logits, k=1), RoutingContext.trivial(30)).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 2] < 0).all()


def test_switch_has_no_gradient_through_the_counts() -> None:
    """f is a count: only the probabilities carry a gradient, the combine weights and logits none."""
    routing = golden_routing()
    leaves = Routing(
        *(t.clone().requires_grad_() for t in (routing.logits_TE, routing.probs_TE)),
        routing.index_TK,
        routing.weight_TK.clone().requires_grad_(),
    )
    BALANCE_LOSSES.get("switch")(leaves, RoutingContext.trivial(4)).backward()
    torch.testing.assert_close(leaves.probs_TE.grad, 3 * torch.tensor([2, 4, 2.0]).div(8).div(4).expand(4, 3))
    assert leaves.weight_TK.grad is None
    assert leaves.logits_TE.grad is None


def test_load_counts_filled_slots_of_real_tokens() -> None:
    routing = dataclasses.replace(golden_routing(), index_TK=torch.tensor([[0, 3], [1, 1], [2, 0], [0, 1]]))
    assert routing.load_E().tolist() == [3, 3, 1]
    assert routing.load_E(torch.tensor([True, True, False, False])).tolist() == [1, 2, 0]
