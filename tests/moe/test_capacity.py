"""The bound on an expert's tokens, against a slow count."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_moe.moe import Capacity, LayerPlan, MoELayer, Routing, RoutingContext, build_layer
from llava_moe.moe.capacity_bounds import heterogeneous_capacity
from tests.moe.cases import NUM_EXPERTS, SPECS, make_experts, make_router


def routing_of(num_tokens: int = 20, k: int = 2) -> Routing:
    return make_router(("top_k", {"k": k}))(torch.randn(num_tokens, 8), RoutingContext.trivial(num_tokens))


def kept_slowly(routing: Routing, mask: list[bool], factor: float, policy: str) -> set[tuple[int, int]]:
    """The (token, slot) pairs that stay: queues filled one by one."""
    slots = [
        (t, k)
        for k in range(routing.index_TK.shape[1])
        for t in range(routing.num_tokens)
        if mask[t] and int(routing.index_TK[t, k]) < routing.num_experts
    ]
    limit = math.ceil(factor * len(slots) / routing.num_experts)
    if policy == "weight":
        slots.sort(key=lambda tk: -float(routing.weight_TK[tk]))
    queues: dict[int, int] = {}
    kept = set()
    for t, k in slots:
        expert = int(routing.index_TK[t, k])
        queues[expert] = queues.get(expert, 0) + 1
        if queues[expert] <= limit:
            kept.add((t, k))
    return kept


@pytest.mark.parametrize("policy", ["position", "weight"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 5.0])
@pytest.mark.parametrize("padded", [False, True])
def test_keeps_what_a_slow_count_keeps(policy: str, factor: float, padded: bool) -> None:
    torch.manual_seed(0)
    routing = routing_of()
    mask = torch.arange(20) % 4 > 0 if padded else torch.ones(20, dtype=torch.bool)
    context = dataclasses.replace(RoutingContext.trivial(20), token_mask_T=mask)
    found = Capacity(Capacity.Config(factor, policy))(routing, context)
    kept = kept_slowly(routing, mask.tolist(), factor, policy)
    for t in range(20):
        for k in range(2):
            if not mask[t] or (t, k) in kept:
                assert found.index_TK[t, k] == routing.index_TK[t, k]
                assert found.weight_TK[t, k] == routing.weight_TK[t, k]
            else:
                assert found.index_TK[t, k] == NUM_EXPERTS
                assert found.weight_TK[t, k] == 0
    assert int(found.extras["dropped_T"].sum()) == int(mask.sum()) * 2 - len(kept)
    assert found.logits_TE is routing.logits_TE


def test_a_large_factor_drops_nothing() -> None:
    routing = routing_of()
    found = Capacity(Capacity.Config(float(NUM_EXPERTS)))(routing, RoutingContext.trivial(20))
    assert torch.equal(found.index_TK, routing.index_TK)
    assert not found.extras["dropped_T"].any()


def test_acts_in_training_only_and_reports() -> None:
    layer = MoELayer(make_router(("top_k", {})), make_experts(SPECS["gated"]), capacity=Capacity(Capacity.Config(0.4)))
    x = torch.randn(30, 8)
    with layer.scope.recording() as routings:
        trained = layer.train()(x)
    assert int(routings["decoder", 0].extras["dropped_T"].sum()) > 0
    with layer.scope.recording() as routings:
        evaluated = layer.eval()(x)
    assert "dropped_T" not in routings["decoder", 0].extras
    assert not torch.allclose(trained, evaluated)


def test_the_factor_stays_float32_and_is_saved() -> None:
    capacity = Capacity(Capacity.Config(1.1))
    assert capacity.to(torch.bfloat16).factor.dtype == torch.float32
    assert float(capacity.factor) == pytest.approx(1.1)
    assert set(capacity.state_dict()) == {"factor"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"factor": 0.0}, "must be above 0"),
        ({"policy": "best"}, "unknown policy"),
        ({"tau": 0.0}, r"tau=0\.0 must be above 0"),
    ],
)
def test_bad_options(args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Capacity(Capacity.parse(args))


@pytest.mark.parametrize("policy", ["position", "weight"])
def test_no_value_is_needed_on_the_host(policy: str) -> None:
    with FakeTensorMode():
        routing = Routing(
            *(torch.rand(20, n) for n in (5, 5)), torch.zeros(20, 2, dtype=torch.int64), torch.rand(20, 2)
        )
        found = Capacity(Capacity.Config(1.0, policy))(routing, RoutingContext.trivial(20))
    assert found.extras["dropped_T"].shape == (20,)


@pytest.mark.parametrize("name", ["top_k", "expert_token_resonance"])
def test_what_the_router_chose_stays_known(name: str) -> None:
    router, context = make_router((name, {})), RoutingContext.trivial(20)
    routing = router(torch.randn(20, 8), context)
    found = Capacity(Capacity.Config(0.4))(routing, context)
    before = found.before_drops()
    assert before.index_TK is routing.index_TK
    assert before.weight_TK is routing.weight_TK
    assert before.load_E().sum() > found.load_E().sum()
    assert routing.before_drops() is routing


def test_drops_of_the_router_itself_count_too() -> None:
    router = make_router(("expert_token_resonance", {"factor": 0.5})).train()
    layer = MoELayer(router, make_experts(SPECS["gated"]), part="vision", capacity=Capacity(Capacity.Config(0.6)))
    with layer.scope.recording() as routings:
        layer.train()(torch.randn(40, 8))
    routing = routings["vision", 0]
    by_router = 40 - int(routing.before_drops().load_E().sum())
    assert 0 < by_router < int(routing.extras["dropped_T"].sum())
    assert int(routing.extras["dropped_T"].sum()) + int(routing.load_E().sum()) == 40


def test_the_largest_weights_stay_also_where_they_subtract() -> None:
    index_TK, weight_TK = torch.zeros(3, 1, dtype=torch.int64), torch.tensor([[0.3], [-0.9], [0.5]])
    routing = Routing(torch.zeros(3, 2), torch.zeros(3, 2), index_TK, weight_TK)
    found = Capacity(Capacity.Config(1.3, "weight"))(routing, RoutingContext.trivial(3))
    assert found.index_TK.flatten().tolist() == [2, 0, 0]


def test_experts_without_computation_have_a_capacity_of_their_own() -> None:
    """1024 slots for eight feed-forward experts and four others: the worked numbers of MoE++."""
    plan = LayerPlan(8, router="moe_plus_plus", experts="special", capacity={"factor": 1.1, "tau": 0.75})
    layer = build_layer(plan, SPECS["gated"]).train()
    with torch.no_grad():
        layer.router.scorer.weight.normal_()
        layer.router.scorer.weight[::9] *= 4  # the first feed-forward expert and the copy
    with layer.scope.recording() as routings:
        layer(torch.randn(512, 8))
    routing = routings["decoder", 0]
    chosen, load = routing.before_drops().load_E(), routing.load_E()
    ffn, other = heterogeneous_capacity(1024, 8, 4, tau=0.75, factor=1.1)
    limit = torch.tensor([math.ceil(ffn)] * 8 + [math.ceil(other)] * 4)
    assert limit.unique().tolist() == [85, 113]
    assert torch.equal(load, torch.minimum(chosen, limit))
    assert (chosen > limit)[:8].any()
    assert (chosen > limit)[8:].any()
