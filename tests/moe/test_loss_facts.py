"""Balance losses one by one: worked numbers, both ends, and what each of them is for."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llava_moe.moe import BALANCE_LOSSES, ROUTERS, LayerPlan, Routing, RoutingContext, build_layer
from tests.moe.cases import SPECS, golden_routing
from tests.moe.loss_cases import NUM_EXPERTS, by_default, context_of, make_loss, routing_of


def test_golden_numbers() -> None:
    routing, context = golden_routing(), RoutingContext.trivial(4)
    values = {
        ("switch", "slot"): 0.99375,
        ("switch", "token"): 1.9875,
        ("gshard", None): 1.0125,
        ("sequence", None): 0.99375,
        ("global_batch", None): 0.99375,
        ("z", None): 0.0,
    }
    for (name, per), value in values.items():
        loss = BALANCE_LOSSES.get(name).build({} if per is None else {"per": per})
        assert float(loss(routing, context)) == pytest.approx(value, abs=1e-6), name
    # CV^2 of the summed probabilities: all slots filled, and an even load beside them
    whole = Routing(
        routing.logits_TE,
        routing.probs_TE,
        torch.arange(3).expand(4, 3),
        routing.probs_TE,
        {"load_prob_TE": torch.full((4, 3), 0.5)},
    )
    found = float(by_default("importance_load")(whole, context))
    assert found == pytest.approx(0.001875, abs=1e-7)  # with the unbiased variance; the biased one would give
    assert found * 2 / 3 == pytest.approx(0.00125, abs=1e-7)


def test_one_sequence_is_switch() -> None:
    routing, mask = routing_of(torch.randn(9, NUM_EXPERTS)), torch.arange(9) < 7
    context = dataclasses.replace(RoutingContext.trivial(9), token_mask_T=mask)
    one, other = (by_default(name)(routing, context) for name in ("sequence", "switch"))
    torch.testing.assert_close(one, other)


def test_switch_equals_transformers() -> None:
    for logits in (torch.randn(14, NUM_EXPERTS), torch.randn(14, NUM_EXPERTS)):
        theirs = load_balancing_loss_func((logits,), NUM_EXPERTS, 2)
        ours = make_loss(("switch", {"per": "token"}))(routing_of(logits), RoutingContext.trivial(14))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["switch", "gshard", "sequence", "global_batch"])
def test_the_two_ends(name: str) -> None:
    context = RoutingContext.trivial(12)
    # ties would put all slots of a uniform router on the first experts, so the slots are dealt out
    dealt = torch.stack([torch.arange(12) % 4, (torch.arange(12) + 1) % 4], dim=-1)
    uniform = routing_of(torch.zeros(12, 4), index=dealt)
    assert float(by_default(name)(uniform, context)) == pytest.approx(1.0, abs=1e-6)
    crowded = routing_of(torch.zeros(12, 4), index=torch.zeros(12, 1, dtype=torch.int64), k=1)
    assert float(by_default(name)(crowded, context)) == pytest.approx(1.0, abs=1e-6), "whatever the load"
    one_for_all = routing_of(torch.tensor([40.0, 0, 0, 0]).repeat(12, 1), k=1)
    assert float(by_default(name)(one_for_all, context)) == pytest.approx(4.0, abs=1e-5)
    lopsided = routing_of(torch.tensor([2.0, 1.0, 0, 0]).repeat(12, 1))
    assert float(by_default(name)(lopsided, context)) > 1.2


def test_the_other_balanced_values() -> None:
    context = context_of(12)
    uniform = routing_of(torch.zeros(12, 4), index=torch.arange(4).expand(12, 4), k=4)
    assert float(by_default("entropy")(uniform, context)) == pytest.approx(-math.log(4), abs=1e-6)
    assert float(by_default("importance_load")(uniform, context)) == pytest.approx(0, abs=1e-9)
    assert float(make_loss(("localised", {"delta": 0.0}))(uniform, context)) == pytest.approx(0, abs=1e-9)
    assert float(by_default("max_z")(uniform, context)) == 0
    assert float(by_default("z")(uniform, context)) == pytest.approx(math.log(4) ** 2)
    assert float(by_default("heterogeneous")(uniform, context)) == pytest.approx((2 + 2 * 0.75) / 16)
    agreeing = dataclasses.replace(uniform, extras={**uniform.extras, "affinity_TE": torch.full((12, 4), 3.0)})
    assert float(by_default("competition")(agreeing, context)) == pytest.approx(0, abs=1e-9)
    certain = routing_of(torch.tensor([60.0, 0, 0, 0]).repeat(12, 1), k=1)
    assert float(by_default("null_reward")(certain, context)) == pytest.approx(0, abs=1e-6)


def test_relu_l1_by_hand() -> None:
    index = torch.tensor([[0, 1], [0, 3], [3, 3], [0, 2]])  # 3 is empty; loads 3, 1, 1
    weight = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.0, 0.0], [0.5, 2.0]])
    routing = Routing(torch.zeros(4, 3), torch.zeros(4, 3), index, weight)
    context = RoutingContext.trivial(4)
    weighted = 3 / 4**2 * (2.0 * 3 + 0.25 * 1 + 2.0 * 1)
    assert float(by_default("relu_l1")(routing, context)) == pytest.approx(weighted)
    assert float(make_loss(("relu_l1", {"k": 2}))(routing, context)) == pytest.approx(weighted / 2)
    assert float(make_loss(("relu_l1", {"load_weighted": False}))(routing, context)) == pytest.approx(4.25 / 12)


def test_relu_l1_reaches_open_gates_only_and_hot_experts_most() -> None:
    logits = torch.tensor([[1.0, -1.0, 0.5], [2.0, -2.0, -0.1], [0.1, 0.2, -0.3]], requires_grad=True)
    gates = logits.relu()
    weight, order = gates.sort(dim=-1, descending=True)
    routing = Routing(logits, gates, order.masked_fill(weight <= 0, 3), weight)
    by_default("relu_l1")(routing, RoutingContext.trivial(3)).backward()
    assert ((logits.grad != 0) == (logits > 0)).all()
    assert logits.grad[0, 0] == pytest.approx(3 * float(logits.grad[0, 2]))  # loads 3 and 1


def test_diversity_by_hand() -> None:
    outputs = torch.tensor([[[1.0, 0], [0, 2.0]], [[1.0, 1.0], [3.0, 3.0]], [[1.0, 0], [-5.0, 0]], [[1.0, 0], [1, 0]]])
    index = torch.tensor([[0, 1], [1, 2], [0, 2], [1, 3]])  # the last token has one expert only
    routing = Routing(torch.zeros(4, 3), torch.zeros(4, 3), index, torch.ones(4, 2), {"outputs_TKD": outputs})
    loss, context = by_default("diversity"), RoutingContext.trivial(4)
    assert float(loss(routing, context)) == pytest.approx((0 + 1 - 1) / 3, abs=1e-6)
    first = dataclasses.replace(context, token_mask_T=torch.tensor([False, True, False, False]))
    assert float(loss(routing, first)) == pytest.approx(1.0)


def test_a_layer_that_did_not_compete_has_no_competition_loss() -> None:
    """As the router `compete_smoe` says so: every extra is one zero, seen in the shape it would have."""
    logits = torch.randn(7, NUM_EXPERTS, requires_grad=True)
    zero = torch.zeros(())
    quiet = {
        "affinity_TE": zero.expand(7, NUM_EXPERTS),
        "competes_T": zero.expand(7),
        "outputs_TKD": zero.expand(7, 2, 64),
    }
    routing = dataclasses.replace(routing_of(logits), extras=quiet)
    for name in ("competition", "diversity"):
        loss = by_default(name)(routing, RoutingContext.trivial(7))
        loss.backward()
        assert float(loss.detach()) == 0
    assert (logits.grad == 0).all()


def test_competition_has_no_gradient_to_its_target() -> None:
    routing = routing_of(torch.randn(6, NUM_EXPERTS, requires_grad=True))
    affinity = torch.randn(6, NUM_EXPERTS, requires_grad=True)
    routing = dataclasses.replace(routing, extras={**routing.extras, "affinity_TE": affinity})
    by_default("competition")(routing, context_of(6)).backward()
    assert affinity.grad is None
    assert routing.logits_TE.grad is not None


def test_cheap_experts_attract_load_as_tau_falls() -> None:
    """The gradient that pushes a logit of a cheap expert up grows as tau gets smaller."""
    pulls = []
    for tau in (1.0, 0.75, 0.1):
        logits = torch.zeros(8, 4, requires_grad=True)
        routing = routing_of(logits, k=1, index=torch.arange(8).unsqueeze(-1) % 4)
        make_loss(("heterogeneous", {"tau": tau}))(routing, RoutingContext.trivial(8)).backward()
        pulls.append(-float(logits.grad[:, 2:].sum()))
    assert pulls[0] == pytest.approx(0, abs=1e-7)
    assert pulls[0] < pulls[1] < pulls[2]


def test_null_reward_raises_the_null_probability() -> None:
    null_logit = torch.zeros(4, requires_grad=True)
    routing = dataclasses.replace(golden_routing(), extras={"null_prob_T": null_logit.sigmoid()})
    loss = by_default("null_reward")(routing, RoutingContext.trivial(4))
    loss.backward()
    assert float(loss.detach()) == -0.5
    assert (null_logit.grad < 0).all()


def test_the_best_slot_is_the_largest_weight_wherever_it_stands() -> None:
    index = torch.tensor([[3, 1, 0], [2, 0, 3], [0, 1, 2], [3, 3, 3]])
    weight = torch.tensor([[0.0, 0.2, 0.7], [-0.9, 0.5, 0.0], [0.3, 0.3, 0.3], [0.0, 0.0, 0.0]])
    probs = torch.eye(3)[[0, 0, 0, 0]]
    value = by_default("gshard")(Routing(probs, probs, index, weight), RoutingContext.trivial(4))
    assert float(value) == pytest.approx(3 * 2 / 3)  # best slots 0, 2 and, of three equal ones, 0


# --- localised and locality


def masses(share: float) -> tuple[Routing, RoutingContext]:
    """Four experts; text tokens have this share of their mass on the first two, image tokens on the last two."""
    text = [share / 2, share / 2, (1 - share) / 2, (1 - share) / 2]
    probs = torch.tensor([text, text, text[::-1]])
    context = dataclasses.replace(RoutingContext.trivial(3), modality_T=torch.tensor([0, 0, 1]))
    return Routing(probs.log(), probs, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)), context


def test_localised_wants_more_mass_on_matching_experts() -> None:
    delta = 0.3
    loss = make_loss(("localised", {"delta": delta}))
    assert float(loss(*masses((1 + delta) / 2))) == pytest.approx(0, abs=1e-9)
    assert float(loss(*masses(0.5))) > 1e-3
    assert float(loss(*masses(0.3))) > float(loss(*masses(0.5)))
    logits = torch.zeros(3, 4, requires_grad=True)
    loss(routing_of(logits), masses(0.5)[1]).backward()
    assert (logits.grad[0, :2] < 0).all()
    assert (logits.grad[0, 2:] > 0).all()
    assert (logits.grad[2, :2] > 0).all()


def test_localised_is_the_printed_formula_with_the_types_exchanged() -> None:
    """CV^2 over experts and types of Q times 1 + delta where they match."""
    routing, context = masses(0.4)
    mass = torch.stack([routing.probs_TE[:2].mean(0), routing.probs_TE[2]])  # text, image
    printed = torch.tensor([[0.9, 0.9, 1.1, 1.1], [1.1, 1.1, 0.9, 0.9]]) * mass  # the first two experts: image
    expected = printed.var() / printed.mean() ** 2
    torch.testing.assert_close(make_loss(("localised", {"delta": 0.1}))(routing, context), expected)


def test_localised_without_one_of_the_modalities() -> None:
    routing, context = masses(0.5)
    text = dataclasses.replace(context, token_mask_T=torch.tensor([True, True, False]))
    expected = torch.tensor([0.9, 0.9, 1.1, 1.1]) * routing.probs_TE[0]
    value = by_default("localised")(routing, text)
    torch.testing.assert_close(value, expected.var() / expected.mean() ** 2)


def test_localised_needs_modalities_and_existing_experts() -> None:
    with pytest.raises(ValueError, match="call the model with input_ids"):
        by_default("localised")(golden_routing(), RoutingContext.trivial(4))
    router = ROUTERS.get("top_k").build(8, 4, {})
    make_loss(("localised", {"image_experts": [0, 3]})).check(router)
    with pytest.raises(ValueError, match=r"image_experts=\[0, 4\] must be numbers from 0 to 3"):
        make_loss(("localised", {"image_experts": [0, 4]})).check(router)
    with pytest.raises(ValueError, match="the projector has no text"):
        by_default("localised").check(router, "projector")


def test_locality_grows_with_the_remote_share() -> None:
    def value(local: float) -> float:
        probs = torch.tensor([[local / 2, local / 2, (1 - local) / 2, (1 - local) / 2]]).expand(5, 4)
        routing = Routing(probs.log(), probs, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))
        return float(make_loss(("locality", {"num_nodes": 2, "epsilon": 0.02}))(routing, RoutingContext.trivial(5)))

    assert value(1.0) == pytest.approx(-math.log(0.99), abs=1e-6)
    assert value(0.0) == pytest.approx(math.log(2 / 0.02), abs=1e-5)
    assert value(0.99) == pytest.approx(0, abs=1e-6)  # the smoothed target itself
    assert value(0.99) < value(0.7) < value(0.5) < value(0.1)


@pytest.mark.parametrize(("rank", "world", "node"), [(0, 4, 0), (1, 4, 0), (2, 4, 1), (3, 4, 1), (0, 1, 0)])
def test_locality_takes_the_node_from_the_rank(
    rank: int, world: int, node: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    assert make_loss(("locality", {"num_nodes": 2})).node == node
    if world == 4:
        with pytest.raises(ValueError, match="num_nodes=3 must divide 4 ranks"):
            _ = make_loss(("locality", {"num_nodes": 3})).node


# --- the global batch


def halves(routing: Routing) -> list[Routing]:
    fields = (routing.logits_TE, routing.probs_TE, routing.index_TK, routing.weight_TK)
    return [Routing(*(t[part] for t in fields)) for part in (slice(0, 6), slice(6, 12))]


def test_micro_batches_see_the_load_of_the_step_so_far() -> None:
    whole, context = routing_of(torch.randn(12, NUM_EXPERTS) * 3), RoutingContext.trivial(6)
    first, second = halves(whole)
    loss, switch = by_default("global_batch"), by_default("switch")
    for _ in range(2):  # the next step begins anew
        loss.start_step()
        torch.testing.assert_close(loss(first, context), switch(first, context))
        share_E = whole.load_E() / whole.load_E().sum()
        expected = NUM_EXPERTS * (share_E * second.probs_TE.mean(0)).sum()
        torch.testing.assert_close(loss(second, context), expected)


def test_equal_micro_batches_have_the_loss_of_one() -> None:
    routing, context = routing_of(torch.randn(6, NUM_EXPERTS)), RoutingContext.trivial(6)
    loss, switch = by_default("global_batch"), by_default("switch")
    loss.start_step()
    for _ in range(3):
        torch.testing.assert_close(loss(routing, context), switch(routing, context))


def test_layers_are_counted_apart() -> None:
    one, other = (routing_of(torch.randn(6, NUM_EXPERTS)) for _ in range(2))
    loss, switch, context = by_default("global_batch"), by_default("switch"), RoutingContext.trivial(6)
    for part, layer, routing in (("decoder", 0, one), ("decoder", 1, other), ("vision", 0, other)):
        there = dataclasses.replace(context, part=part, layer=layer)
        torch.testing.assert_close(loss(routing, there), switch(routing, there))


def test_ranks_together_have_the_loss_of_their_joint_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over two equally full ranks is the loss of one process with both batches; for Switch it is not."""
    whole, context = routing_of(torch.randn(12, NUM_EXPERTS) * 3), RoutingContext.trivial(6)
    ranks = halves(whole)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda load_E: load_E.copy_(whole.load_E()))
    together = sum(by_default("global_batch")(rank, context) for rank in ranks) / 2
    joint = by_default("switch")(whole, RoutingContext.trivial(12))
    torch.testing.assert_close(together, joint)
    alone = sum(by_default("switch")(rank, context) for rank in ranks) / 2
    assert abs(float(alone - joint)) > 1e-3


# --- with the routers that they are for


_PAIRS = [(name, router) for name in BALANCE_LOSSES.names() for router in BALANCE_LOSSES.get(name).provided_by]


@pytest.mark.parametrize(("name", "router"), [*_PAIRS, ("relu_l1", "remoe")])
def test_the_real_router_gets_a_gradient(name: str, router: str) -> None:
    """Through a whole layer in training, half of the tokens being padding."""
    experts = "special" if router == "moe_plus_plus" else "stacked"
    layer = build_layer(LayerPlan(num_experts=4, router=router, experts=experts), SPECS["gated"]).train()
    for parameter in layer.router.parameters():  # some begin at 0, where nothing flows back to x
        torch.nn.init.normal_(parameter, std=0.5)
    if router == "compete_smoe":
        layer.router.competes.fill_(1.0)
    mask = torch.arange(12) % 2 == 0
    context = dataclasses.replace(RoutingContext.trivial(12), token_mask_T=mask)
    layer.scope.set_context(context)
    x = torch.randn(12, SPECS["gated"].hidden, requires_grad=True)
    with layer.scope.recording() as routings:
        layer(x)
    loss = by_default(name)
    loss.check(layer.router)
    value = loss(routings["decoder", 0], context)
    value.backward()
    assert math.isfinite(float(value.detach()))
    # the diversity loss is about the experts; all others teach the router
    taught = layer.experts if name == "diversity" else layer.router
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in taught.parameters())
    assert x.grad[0].abs().max() > 0
    assert (x.grad[1::2] == 0).all()
