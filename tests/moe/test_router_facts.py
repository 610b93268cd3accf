"""What is particular to one scorer or to the routers made of it: the facts that its paper claims or implies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_moe.moe import ROUTERS, SCORERS, Routing, RoutingContext, Scorer
from llava_moe.moe.routers.noisy_top_k import load_probability
from tests.moe.cases import (
    HIDDEN,
    NUM_EXPERTS,
    SPECS,
    Case,
    as_numpy,
    full_context,
    make_experts,
    make_router,
    state_as_numpy,
)
from tests.reference import oracles

CONVENTIONS = ("softmax_topk_renorm", "softmax_topk", "topk_softmax")


def context(num_tokens: int) -> RoutingContext:
    return RoutingContext.trivial(num_tokens)


def make_scorer(name: str, num_experts: int = NUM_EXPERTS, hidden: int = HIDDEN, **options: Any) -> Scorer:
    """With parameters of order one."""
    scorer = SCORERS.get(name).build(hidden, num_experts, options)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.normal_()
    return scorer


def logits(scorer: Scorer, x_TD: Tensor) -> Tensor:
    return scorer(x_TD, context(len(x_TD))).logits_TE


# Softmax top-k


@pytest.mark.parametrize("k", [0, NUM_EXPERTS + 1])
def test_impossible_k_is_refused(k: int) -> None:
    for name in ("top_k", "sigmoid", "deepseek_v3", "remoe", "dts", "random", "hash", "cosine", "noisy_top_k"):
        with pytest.raises(ValueError, match=f"k={k} must be between 1 and the {NUM_EXPERTS} experts"):
            make_router((name, {"k": k}))


def test_unknown_convention_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'softmax_topk"):
        make_router(("top_k", {"convention": "softmax-topk"}))


def routings_by_convention(k: int, x: Tensor) -> dict[str, Routing]:
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
def test_task_gradient_of_the_router_at_k_1(convention: str) -> None:
    """With k = 1 and weights that sum to 1, the task loss teaches the router nothing, ever."""
    router = make_router(("top_k", {"k": 1, "convention": convention}))
    routing = router(torch.randn(20, HIDDEN), context(20))
    (routing.weight_TK * torch.randn(20, 1)).sum().backward()
    largest = router.get_parameter("scorer.weight").grad.abs().max()
    assert (largest > 1e-3) if convention == "softmax_topk" else (largest < 1e-6)


def test_permuting_the_experts_permutes_the_routing() -> None:
    router, x = make_router(("top_k", {"k": 2, "bias": True})), torch.randn(15, HIDDEN)
    before, order = router(x, context(15)), torch.randperm(NUM_EXPERTS)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(parameter[order].clone())
    after = router(x, context(15))
    assert torch.equal(order[after.index_TK], before.index_TK)
    torch.testing.assert_close(after.weight_TK, before.weight_TK)


NORMALISED: list[Case] = [
    ("top_k", {}),
    ("top_k", {"convention": "topk_softmax", "k": 3, "scheduled_k": True}),
    ("noisy_top_k", {}),
    ("sigmoid", {"renormalise": True}),
    ("perturbed_cosine", {}),
    ("xmoe", {"selector": "double_softmax"}),
    ("hyper_router", {}),
    ("deepseek_v3", {}),
    ("skywork", {}),
    ("top_p", {}),
    ("dense", {}),
    ("random", {}),
    ("hash", {"k": 2}),
]


@pytest.mark.parametrize("case", NORMALISED, ids=lambda case: case[0])
def test_equal_experts_make_any_normalised_router_a_dense_block(case: Case) -> None:
    experts, x = make_experts(SPECS["gated-bias"]), torch.randn(9, HIDDEN)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
    one = experts(x, torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1))
    for training in (False, True):
        routing = make_router(case).train(training)(x, full_context(9))
        torch.testing.assert_close(experts(x, routing.index_TK, routing.weight_TK), one, rtol=1e-5, atol=1e-5)


# Noisy top-k


def test_noise_is_of_the_declared_size_and_only_in_training() -> None:
    scorer = make_scorer("noisy_linear", noise_floor=0.5)
    x = torch.randn(1, HIDDEN).expand(20000, HIDDEN)
    scores = scorer.train()(x, context(20000))
    expected = torch.nn.functional.softplus(x[0] @ scorer.get_parameter("noise_weight").t()) + 0.5
    noise = scores.selection_TE - scores.logits_TE
    torch.testing.assert_close(scores.extras["noise_std_TE"][0], expected)
    torch.testing.assert_close(noise.std(0), expected, rtol=0.05, atol=0)
    assert (noise.mean(0).abs() < 0.05 * expected).all()
    scores = scorer.eval()(x, context(20000))
    assert torch.equal(scores.selection_TE, scores.logits_TE)


def test_noisy_top_k_starts_from_zero_with_the_noise_of_the_paper() -> None:
    router = ROUTERS.get("noisy_top_k").build(HIDDEN, NUM_EXPERTS, {})
    assert all((parameter == 0).all() for parameter in router.parameters())
    load = router(torch.randn(4000, HIDDEN), context(4000)).load_E()
    assert load.min() > 0.9 * load.mean(), "the noise alone spreads the tokens"


@pytest.mark.parametrize("k", [1, 2])
def test_load_probability_is_that_of_drawing_one_noise_again(k: int) -> None:
    draws, experts = 40000, 4
    clean, std = torch.randn(1, experts), torch.rand(1, experts) + 0.3
    noisy = clean + torch.randn(1, experts) * std
    found = load_probability(clean, noisy, std, k)
    for expert in range(experts):
        again = noisy.expand(draws, experts).clone()
        again[:, expert] = clean[0, expert] + torch.randn(draws) * std[0, expert]
        share = (again.topk(k, dim=-1).indices == expert).any(-1).float().mean()
        assert abs(float(share - found[0, expert])) < 0.01


def test_load_probability_counts_in_evaluation_and_teaches_in_training() -> None:
    router, x = make_router(("noisy_top_k", {})), torch.randn(12, HIDDEN)
    routing = router.eval()(x, context(12))
    assert torch.equal(routing.extras["load_prob_TE"], (routing.gates_TE() > 0).float())
    load = router.train()(x, context(12)).extras["load_prob_TE"]
    assert ((load >= 0) & (load <= 1)).all()
    (load * torch.randn_like(load)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in router.parameters())
    everything = make_router(("noisy_top_k", {"k": NUM_EXPERTS})).train()(x, context(12))
    assert (everything.extras["load_prob_TE"] == 1).all()


# Cosines


def test_cosine_sees_directions_only() -> None:
    scorer, x = make_scorer("cosine", temperature=0.5), torch.randn(7, HIDDEN)
    before = logits(scorer, x)
    assert (before.abs() <= 2 + 1e-5).all()
    torch.testing.assert_close(logits(scorer, 30 * x), before)
    with torch.no_grad():
        scorer.get_parameter("weight").mul_(torch.rand(NUM_EXPERTS, 1) + 0.1)
    torch.testing.assert_close(logits(scorer, x), before)


def test_perturbation_of_zero_is_the_cosine() -> None:
    plain, x = make_scorer("cosine"), torch.randn(7, HIDDEN)
    perturbed = make_scorer("perturbed_cosine", theta1=0.0, theta2=0.0)
    perturbed.load_state_dict(plain.state_dict())
    torch.testing.assert_close(logits(perturbed, x), logits(plain, x))


def test_perturbed_cosine_grows_with_the_length_of_the_token() -> None:
    scorer = make_scorer("perturbed_cosine")
    direction = torch.randn(1, HIDDEN)
    lengths = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 1.0, 10.0]).unsqueeze(-1)
    found = logits(scorer, direction * lengths)
    assert torch.isfinite(found).all()
    assert (found[0] == 0).all()
    assert (found[1].abs() < 1e-4).all()
    assert (found.abs() < 1).all()
    assert (found.abs().diff(dim=0) > 0).all()
    with pytest.raises(ValueError, match="theta1=-1"):
        make_scorer("perturbed_cosine", theta1=-1.0)


# XMoE


def test_xmoe_sees_directions_only_and_is_bounded() -> None:
    scorer = make_scorer("xmoe", num_experts=7, temperature=0.3, learn_temperature=False, embedding_norm=1.5)
    assert scorer.get_parameter("projection").shape == (3, HIDDEN)
    x = torch.randn(9, HIDDEN)
    before = logits(scorer, x)
    assert (before.abs() <= 1.5 / 0.3 + 1e-4).all()
    torch.testing.assert_close(logits(scorer, 20 * x), before)
    with torch.no_grad():
        scorer.get_parameter("embeddings").mul_(torch.rand(7, 1) + 0.1)
    torch.testing.assert_close(logits(scorer, x), before)


def test_xmoe_temperature_learns_and_sharpens() -> None:
    router, x = make_router(("xmoe", {"k": 1})), torch.randn(30, HIDDEN)
    routing = router(x, context(30))
    (routing.probs_TE * torch.randn(30, NUM_EXPERTS)).sum().backward()
    temperature = router.get_parameter("scorer.temperature.log_value")
    assert temperature.grad.abs() > 0
    with torch.no_grad():
        temperature.fill_(math.log(1e-3))
    sharp = router(x, context(30))
    assert torch.equal(sharp.index_TK, routing.index_TK)
    assert (sharp.probs_TE.amax(-1) > 0.99).float().mean() > 0.9
    router.reset_parameters()
    assert float(temperature.detach().exp()) == pytest.approx(0.3, rel=1e-5)


def test_double_softmax_is_nearly_uniform() -> None:
    routing = make_router(("xmoe", {"k": 3, "selector": "double_softmax"}))(50 * torch.randn(40, HIDDEN), context(40))
    assert (routing.weight_TK.amax(-1) / routing.weight_TK.amin(-1) <= math.e + 1e-4).all()


def test_xmoe_options_are_checked() -> None:
    for options, message in [
        ({"width": 0}, "width=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"embedding_norm": -1.0}, "embedding_norm=-1.0"),
        ({"embedding_init": "ortogonal"}, "did you mean 'orthogonal'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_scorer("xmoe", **options)


def test_orthogonal_embeddings() -> None:
    scorer = SCORERS.get("xmoe").build(HIDDEN, 4, {"width": 6, "embedding_init": "orthogonal"})
    rows = scorer.get_parameter("embeddings").detach()
    torch.testing.assert_close(rows @ rows.t(), 0.32**2 * torch.eye(4), rtol=0, atol=1e-6)


# HyperRouter


def test_only_the_embedding_of_hyper_router_learns() -> None:
    router = ROUTERS.get("hyper_router").build(HIDDEN, NUM_EXPERTS, {})
    assert sum(p.numel() for p in router.parameters()) == HIDDEN
    x = torch.randn(20, HIDDEN)
    before = router(x, context(20))
    (before.weight_TK * torch.randn(20, 2)).sum().backward()
    optimiser = torch.optim.SGD(router.parameters(), lr=10.0)
    saved = {name: value.clone() for name, value in router.state_dict().items()}
    optimiser.step()
    changed = {name for name, value in router.state_dict().items() if not torch.equal(value, saved[name])}
    assert changed == {"scorer.embedding"}
    assert not torch.allclose(router(x, context(20)).logits_TE, before.logits_TE)
    other = ROUTERS.get("hyper_router").build(HIDDEN, NUM_EXPERTS, {})
    assert not torch.allclose(other(x, context(20)).logits_TE, before.logits_TE)
    other.load_state_dict(saved)
    assert torch.equal(other(x, context(20)).logits_TE, before.logits_TE)
    assert sum(p.numel() for p in make_router(("hyper_router", {"freeze": False})).parameters()) > 10 * HIDDEN


@pytest.mark.parametrize("selector", [*CONVENTIONS, "double_softmax"])
def test_active_k_acts_as_a_smaller_k(selector: str) -> None:
    large = make_router(("hyper_router", {"k": 4, "selector": selector, "selector_args": {"scheduled_k": True}}))
    x, knob = torch.randn(20, HIDDEN), large.get_buffer("selector.schedule.active_k")
    assert knob == 4
    for active in (4, 2, 1):
        small = make_router(("hyper_router", {"k": active, "selector": selector}))
        small.scorer.load_state_dict(large.scorer.state_dict())
        knob.fill_(active)
        found, expected = large(x, context(20)), small(x, context(20))
        torch.testing.assert_close(found.gates_TE(), expected.gates_TE())
        assert torch.equal(found.index_TK[:, :active], expected.index_TK)
        assert (found.index_TK[:, active:] == NUM_EXPERTS).all()
        assert (found.weight_TK[:, active:] == 0).all()
        found.weight_TK.square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in large.parameters())
    knob.fill_(0)
    assert (large(x, context(20)).load_E().sum()) == 20, "one expert always stays"


# Skywork


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_logits_of_skywork_have_the_chosen_spread(scale: float) -> None:
    found = logits(make_scorer("logit_norm", scale=scale), torch.randn(11, HIDDEN))
    torch.testing.assert_close(found.std(-1, unbiased=False), torch.full((11,), scale))
    torch.testing.assert_close(found.mean(-1), torch.zeros(11), rtol=0, atol=1e-6)


def test_a_larger_scale_sharpens_the_gate() -> None:
    x, peaks = torch.randn(11, HIDDEN), []
    source = make_router(("skywork", {}))
    for scale in (0.5, 1.0, 3.0):
        router = make_router(("skywork", {"scale": scale}))
        router.load_state_dict(source.state_dict())
        peaks.append(router(x, context(11)).probs_TE.amax(-1))
        torch.testing.assert_close(router(100 * x, context(11)).probs_TE.amax(-1), peaks[-1])
    assert (peaks[0] < peaks[1]).all()
    assert (peaks[1] < peaks[2]).all()


# Pairs with a selector of one's choice


def test_selectors_without_k_and_k_given_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="selector='dense_softmax' takes no k"):
        make_router(("cosine", {"selector": "dense_softmax"}))
    with pytest.raises(ValueError, match="selector_args must not have 'k'"):
        make_router(("cosine", {"selector_args": {"k": 1}}))
    with pytest.raises(ValueError, match="did you mean 'sigmoid_topk"):
        make_router(("xmoe", {"selector": "sigmoid_top_k"}))
    assert make_router(("cosine", {"selector": "top_p", "k": 3})).active_experts == 3


@pytest.mark.parametrize("name", ["cosine", "perturbed_cosine", "xmoe", "skywork", "hyper_router"])
@pytest.mark.parametrize("selector", ["sigmoid_topk_renorm", "group_limited", "relu", "top_p", "dts"])
def test_any_scorer_works_with_any_selector(name: str, selector: str) -> None:
    router, x = make_router((name, {"k": 2, "selector": selector})).eval(), torch.randn(6, HIDDEN)
    routing = router(x, context(6))
    tokens, numbers = x.double().numpy(), as_numpy(full_context(6))
    gates, _ = oracles.ROUTERS[name](state_as_numpy(router), router.config, tokens, numbers)
    torch.testing.assert_close(routing.gates_TE().detach().double(), torch.from_numpy(gates), rtol=1e-4, atol=1e-5)
