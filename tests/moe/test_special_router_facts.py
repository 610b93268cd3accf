"""What is particular to MoE++, TC-MoE, CompeteSMoE and routing by modality."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_moe.moe import BALANCE_LOSSES, EXPERTS, LayerPlan, MoELayer, Routing, build_layer
from llava_moe.moe.capacity_bounds import heterogeneous_capacity
from tests.moe.special_cases import HIDDEN, NUM_EXPERTS, SPEC, full_context, layer_of, make, trivial

# MoE++


def test_moe_plus_plus_gives_the_mate_of_a_zero_expert_all_the_weight() -> None:
    router, context = make(("moe_plus_plus", {})), trivial(200)
    routing = router(torch.randn(200, HIDDEN), context)
    zero = routing.index_TK == NUM_EXPERTS - 2
    assert zero.any(dim=1).sum() > 10
    assert (routing.weight_TK[zero] == 0).all()
    assert torch.equal(routing.weight_TK[zero.flip(1)], torch.ones(int(zero.sum())))
    assert routing.extras["zero_compute_E"].tolist() == [False] * 4 + [True] * 2
    assert router.normalised
    alone = make(("moe_plus_plus", {"k": 1}))
    routing = alone(torch.randn(200, HIDDEN), context)
    assert set(routing.weight_TK.unique().tolist()) == {0.0, 1.0}
    assert not alone.normalised


def test_moe_plus_plus_hands_logits_on() -> None:
    router, x = make(("moe_plus_plus", {})), torch.randn(9, HIDDEN)
    first = router(x, trivial(9))
    first.probs_TE.square().sum().backward()
    assert torch.equal(router.residual.grad, torch.zeros_like(router.residual))
    before = torch.randn(9, NUM_EXPERTS, requires_grad=True)
    previous = Routing(before, before.softmax(-1), first.index_TK, first.weight_TK)
    later = router(x, trivial(9, previous=previous))
    torch.testing.assert_close(later.logits_TE, first.logits_TE + before @ router.residual.t())
    later.weight_TK.square().sum().backward()
    assert before.grad.abs().sum() > 0
    with torch.no_grad():
        router.residual.zero_()
    assert torch.equal(router(x, trivial(9, previous=previous)).logits_TE, first.logits_TE)
    with pytest.raises(ValueError, match="all need the same number of experts"):
        router(x[:4], trivial(4, previous=previous))


def test_moe_plus_plus_reads_the_accumulated_logits_of_the_layer_below() -> None:
    layers = [layer_of("moe_plus_plus", "special")]
    for index in (2, 5):
        layer = layer_of("moe_plus_plus", "special")
        layers.append(MoELayer(layer.router, layer.experts, index, layers[0].scope, "vision"))
    x = torch.randn(7, HIDDEN)
    with layers[0].scope.recording() as routings:
        for layer in layers:
            layer(x)
    expected = torch.zeros(7, 6)
    for layer in layers:
        expected = x @ layer.router.scorer.weight.t() + expected @ layer.router.residual.t()
        torch.testing.assert_close(routings[layer.site].logits_TE, expected)


def test_moe_plus_plus_needs_special_experts() -> None:
    with pytest.raises(ValueError, match="needs zero, copy or constant experts; use the experts 'special'"):
        build_layer(LayerPlan(4, router="moe_plus_plus"), SPEC)


def load_after_training(router: str, loss: str, options: dict[str, float], read: Any) -> float:
    """What `read` makes of the routing after the balance loss alone has moved the router for a while."""
    layer = make((router, {}))
    torch.manual_seed(3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, context = torch.randn(200, HIDDEN), trivial(200)
    term, optimiser = BALANCE_LOSSES.get(loss).build(options), torch.optim.Adam(layer.parameters(), lr=0.03)
    for _ in range(60):
        optimiser.zero_grad()
        term(layer(x, context), context).backward()
        optimiser.step()
    return read(layer(x, context))


def test_moe_plus_plus_a_small_tau_pushes_tokens_to_the_computation_free_experts() -> None:
    def share(routing: Routing) -> float:
        return float(routing.load_E()[4:].sum() / routing.load_E().sum())

    low, high = (load_after_training("moe_plus_plus", "heterogeneous", {"tau": tau}, share) for tau in (0.1, 1.0))
    assert low > high + 0.1


def test_moe_plus_plus_capacities() -> None:
    ffn, zero_compute = heterogeneous_capacity(1024, 8, 4, tau=0.75, factor=1.1)
    assert (ffn, zero_compute) == pytest.approx((84.48, 112.64))
    assert 8 * ffn / (8 * ffn + 4 * zero_compute) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="tau=0"):
        heterogeneous_capacity(1024, 8, 4, tau=0, factor=1.1)


# TC-MoE


def test_tc_moe_exchanging_the_signs_flips_the_output() -> None:
    layer = layer_of("tc_moe", k=3, negative_offset=0.0).eval()
    x = torch.randn(30, HIDDEN)
    y, before = layer(x), layer.router(x, trivial(30))
    assert (before.weight_TK < 0).any()
    assert (before.weight_TK > 0).any()
    with torch.no_grad():
        weight = layer.router.weight
        weight.copy_(torch.cat([weight[4:8], weight[:4], weight[8:]]).clone())
    torch.testing.assert_close(layer(x), -y)
    after = layer.router(x, trivial(30))
    torch.testing.assert_close(after.probs_TE, before.probs_TE)
    torch.testing.assert_close(after.load_E(), before.load_E())
    context = trivial(30)
    switch = BALANCE_LOSSES.get("switch").build({})
    torch.testing.assert_close(switch(after, context), switch(before, context))


def test_tc_moe_all_null_is_no_expert_at_all() -> None:
    layer, x = layer_of("tc_moe", null_offset=1e3).eval(), torch.randn(5, HIDDEN)
    routing = layer.router(x, trivial(5))
    assert (routing.index_TK == 4).all()
    assert torch.equal(layer(x), torch.zeros(5, HIDDEN))
    torch.testing.assert_close(routing.extras["null_prob_T"], torch.ones(5))


def test_tc_moe_shares_of_experts_and_nulls_sum_to_one() -> None:
    """n = mass of the chosen experts + mass of all nulls; the nulls' own share is their mass over n."""
    router, x = make(("tc_moe", {"k": 2, "negative_offset": -50.0, "null_offset": 0.0})), torch.randn(40, HIDDEN)
    routing = router(x, trivial(40))
    null_T, used = routing.extras["null_prob_T"], routing.weight_TK > 0
    chosen = torch.where(used, F.pad(routing.probs_TE, (0, 1)).gather(1, routing.index_TK), 0.0).sum(-1)
    torch.testing.assert_close(routing.weight_TK.sum(-1) + null_T / (chosen + null_T), torch.ones(40))
    torch.testing.assert_close(routing.probs_TE.sum(-1) + null_T, torch.ones(40))
    assert ((routing.index_TK < NUM_EXPERTS).sum(-1) == 1).any()  # one null, one expert


def test_tc_moe_the_reward_raises_the_null_rate() -> None:
    def null_rate(routing: Routing) -> float:
        return float(routing.extras["null_prob_T"].detach().mean())

    router = make(("tc_moe", {}))
    with torch.no_grad():
        router.weight.normal_(std=0.1)
    before = null_rate(router(torch.randn(200, HIDDEN), trivial(200)))
    assert load_after_training("tc_moe", "null_reward", {}, null_rate) > 10 * before


def test_tc_moe_an_expert_chosen_with_both_signs_runs_once() -> None:
    router = make(("tc_moe", {"k": 2, "negative_offset": 0.0}))
    with torch.no_grad():
        router.weight.zero_()
        router.weight[3, 0], router.weight[3 + NUM_EXPERTS, 0] = 9.0, 8.0
    routing = router(F.one_hot(torch.tensor([0]), HIDDEN).float(), trivial(1))
    assert routing.index_TK.tolist() == [[3, NUM_EXPERTS]]
    expected = (math.exp(9) - math.exp(8)) / (math.exp(9) + math.exp(8))
    assert routing.weight_TK[0].tolist() == pytest.approx([expected, 0.0], abs=1e-4)
    joined = torch.logsumexp(torch.tensor([9.0, 8.0]), 0)
    torch.testing.assert_close(routing.logits_TE[0, 3], joined)


# CompeteSMoE


def competing(k: int = 2) -> Any:
    layer = layer_of("compete_smoe", k=k).train()
    layer.router.competes.fill_(1.0)
    return layer


def test_compete_smoe_competition_step_follows_its_formula() -> None:
    layer, x = competing(), torch.randn(12, HIDDEN)
    with layer.scope.recording() as routings:
        y = layer(x)
    routing = routings["vision", 0]
    outputs = layer.experts.every(x)
    affinity = F.softplus(outputs).mean(-1)
    top, index = affinity.topk(2, dim=-1)
    assert torch.equal(routing.index_TK, index)
    torch.testing.assert_close(routing.weight_TK, top / top.sum(-1, keepdim=True))
    torch.testing.assert_close(routing.probs_TE, affinity.softmax(-1))
    torch.testing.assert_close(routing.logits_TE, x @ layer.router.scorer.weight.t())
    torch.testing.assert_close(routing.extras["affinity_TE"], affinity)
    assert not routing.extras["affinity_TE"].requires_grad
    assert routing.extras["competes_T"].tolist() == [1.0] * 12
    picked = outputs[torch.arange(12).unsqueeze(1), index]
    torch.testing.assert_close(routing.extras["outputs_TKD"], picked)
    torch.testing.assert_close(y, (picked * routing.weight_TK.unsqueeze(-1)).sum(1))


def test_compete_smoe_losers_get_no_gradient_from_the_output() -> None:
    layer, x = competing(), torch.randn(1, HIDDEN)
    with layer.scope.recording() as routings:
        y = layer(x)
    routing = routings["vision", 0]
    winners = routing.index_TK[0].tolist()
    y.square().sum().backward(retain_graph=True)
    by_expert = layer.experts.down_proj.grad.abs().sum(dim=(1, 2))
    assert [e for e in range(4) if by_expert[e] > 0] == sorted(winners)
    assert layer.router.scorer.weight.grad is None  # the response decides, not the router
    loss = BALANCE_LOSSES.get("competition").build({})(routing, trivial(1))
    loss.backward()
    assert loss.item() > 0
    assert layer.router.scorer.weight.grad.abs().sum() > 0
    assert torch.equal(by_expert, layer.experts.down_proj.grad.abs().sum(dim=(1, 2)))  # the target is a constant


def test_compete_smoe_never_competes_in_evaluation() -> None:
    router, x = make(("compete_smoe", {})), torch.randn(6, HIDDEN)
    router.competes.fill_(1.0)

    def forbidden(x_TD: Tensor) -> Tensor:
        raise AssertionError("all experts were run")

    routing = router.eval()(x, trivial(6, run_experts=forbidden))
    assert not any(routing.extras["outputs_TKD"].stride())  # zeros that take no memory
    assert routing.extras["outputs_TKD"].shape == (6, 2, HIDDEN)
    assert routing.extras["affinity_TE"].shape == (6, NUM_EXPERTS)
    assert routing.extras["competes_T"].tolist() == [0.0] * 6
    with pytest.raises(AssertionError, match="all experts were run"):
        router.train()(x, trivial(6, run_experts=forbidden))
    with pytest.raises(ValueError, match=r"needs context\.run_experts"):
        router(x, trivial(6))


def test_compete_smoe_obeys_its_knob_alone() -> None:
    """However the buffer is written to, and without any randomness, so that two ranks do the same."""
    router, x = make(("compete_smoe", {})).train(), torch.randn(6, HIDDEN)

    def competes(one: Any) -> bool:
        return bool(one(x, full_context(6)).extras["competes_T"].all())

    state = torch.get_rng_state()
    answers = [competes(router)]
    for value in (1.0, 0.0, 1.0):
        router.competes.fill_(value)
        answers += [competes(router), competes(router)]
    assert answers == [False, True, True, False, False, True, True]
    assert competes(copy.deepcopy(router))
    other = make(("compete_smoe", {})).train()
    assert not competes(other)
    other.load_state_dict(router.state_dict())
    assert competes(other)
    router.competes.fill_(0.0)
    assert not competes(router.to(torch.bfloat16).float())
    fresh = full_context(6)
    state = torch.get_rng_state()
    router(x, fresh)
    assert torch.equal(state, torch.get_rng_state())


def test_compete_smoe_learns_who_would_win() -> None:
    layer, x = competing(k=1), torch.randn(64, HIDDEN)
    optimiser = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    loss_of, context = BALANCE_LOSSES.get("competition").build({}), trivial(64)
    # affinities far enough apart for the squared error of their softmax to mean something
    with torch.no_grad():
        layer.experts.down_proj.mul_(8)
    agreed = []
    for _ in range(60):
        optimiser.zero_grad()
        with layer.scope.recording() as routings:
            layer(x)
        routing = routings["vision", 0]
        loss_of(routing, context).backward()
        optimiser.step()
        agreed.append(float((routing.logits_TE.argmax(-1) == routing.index_TK[:, 0]).float().mean()))
    assert agreed[-1] > agreed[0] + 0.1


# Modality


def test_modality_experts_serve_their_own_modality() -> None:
    router, context = make(("modality", {"mode": "experts", "image_experts": 2})), full_context(60)
    routing = router(torch.randn(60, HIDDEN), context)
    image = context.modality_T == 1
    assert set(routing.index_TK[image].unique().tolist()) == {0, 1}
    assert set(routing.index_TK[~image].unique().tolist()) == {2, 3, 4, 5}
    assert (routing.probs_TE[image][:, 2:] == 0).all()
    for name in ("z", "switch"):
        assert torch.isfinite(BALANCE_LOSSES.get(name).build({})(routing, context))


def test_modality_routers_share_experts_and_nothing_else() -> None:
    router, context = make(("modality", {})), full_context(60)
    x, image = torch.randn(60, HIDDEN), context.modality_T == 1
    routing = router(x, context)
    for inner, own in ((router.image, image), (router.text, ~image)):
        torch.testing.assert_close(routing.gates_TE()[own], inner(x[own], trivial(int(own.sum()))).gates_TE())
    grads = torch.autograd.grad(routing.gates_TE()[image].square().sum(), list(router.parameters()))
    assert grads[0].abs().sum() > 0
    assert grads[1].abs().sum() == 0


def test_modality_missing_means_text_in_evaluation_and_an_error_in_training() -> None:
    router, x = make(("modality", {})), torch.randn(6, HIDDEN)
    torch.testing.assert_close(router.eval()(x, trivial(6)).gates_TE(), router.text(x, trivial(6)).gates_TE())
    with pytest.raises(ValueError, match=r"needs context\.modality_T"):
        router.train()(x, trivial(6))


def test_modality_of_a_router_whose_tokens_compete() -> None:
    """Experts choose among the tokens of their own modality: those of the other are padding to them."""
    args = {"mode": "experts", "router": "expert_choice", "router_args": {"capacity_factor": 1.0}}
    router, context = make(("modality", args)), full_context(28)
    routing, image = router(torch.randn(28, HIDDEN), context), context.modality_T == 1
    assert not router.token_choice
    assert not router.causal_safe
    taken = routing.gates_TE() > 0
    assert not taken[image][:, 3:].any()
    assert not taken[~image][:, :3].any()
    real = context.token_mask_T & (context.sequence_T == 0)
    assert taken[real & image].sum(0).tolist() == [math.ceil(int((real & image).sum()) / 3)] * 3 + [0] * 3


def test_modality_refuses_a_router_with_a_side_branch() -> None:
    with pytest.raises(ValueError, match="router='hyper_moe' has a side branch"):
        build_layer(LayerPlan(4, router="modality", router_args={"router": "hyper_moe"}), SPEC)


def test_experts_of_all_kinds_take_any_of_these_routers() -> None:
    for kind in EXPERTS.names():
        for name in ("tc_moe", "base_layer", "expert_choice"):
            layer = build_layer(LayerPlan(4, router=name, experts=kind), SPEC, part="vision")
            assert isinstance(layer.experts, nn.Module)
            assert torch.isfinite(layer(torch.randn(2, 5, HIDDEN))).all()


def test_modality_needs_what_its_routers_need() -> None:
    assert make(("modality", {"router": "hash", "router_args": {"k": 1}})).needs == ("modality_T", "token_ids_T")
    assert make(("modality", {})).needs == ("modality_T",)
