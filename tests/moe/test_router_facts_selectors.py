"""What is particular to one selector or to the routers made of it: the facts that its paper claims or implies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llava_moe.moe import CONTROLLERS, ROUTERS, SELECTORS, LayerStats, RoutingContext, StepStats
from llava_moe.moe.selectors import Selection
from tests.moe.cases import HIDDEN, NUM_EXPERTS, Case, make_layer, make_router


def context(num_tokens: int) -> RoutingContext:
    return RoutingContext.trivial(num_tokens)


def select(name: str, scores_TE: Tensor, training: bool = False, **options: Any) -> Selection:
    selector = SELECTORS.get(name).build(scores_TE.shape[-1], options).train(training)
    return selector(scores_TE, context(len(scores_TE)))


def test_the_known_knobs_exist() -> None:
    knobs: list[tuple[Case, str]] = [
        (("top_k", {"scheduled_k": True}), "active_k"),
        (("hyper_router", {"selector_args": {"scheduled_k": True}}), "active_k"),
        (("deepseek_v2", {}), "selection_bias_E"),
        (("deepseek_v3", {}), "selection_bias_E"),
        (("dts", {}), "temperature"),
    ]
    for case, knob in knobs:
        assert any(name.endswith(knob) for name, _ in make_router(case).named_buffers())
    assert not list(make_router(("top_k", {})).named_buffers())


# Sigmoid


def test_sigmoids_do_not_compete() -> None:
    """Raising the score of one expert leaves the weights of the others; under a softmax it does not."""
    scores = torch.randn(30, NUM_EXPERTS)
    raised = scores.clone()
    raised[:, 2] += 0.5
    everyone = {"k": NUM_EXPERTS}
    others = [0, 1, 3, 4]
    for name, compete in [("sigmoid_topk", False), ("softmax_topk", True), ("sigmoid_topk_renorm", True)]:
        gates = []
        for rows in (scores, raised):
            found = select(name, rows, **everyone)
            gates.append(torch.zeros_like(rows).scatter(1, found.index_TK, found.weight_TK)[:, others])
        assert torch.equal(*gates) != compete
    found = select("sigmoid_topk", scores, k=3)
    assert ((found.weight_TK > 0) & (found.weight_TK < 1)).all()
    torch.testing.assert_close(found.probs_TE.sum(-1), torch.ones(30))


def test_saturated_sigmoids_still_rank_and_divide() -> None:
    scores = torch.tensor([[30.0, 40.0, 50.0], [-300.0, -200.0, -201.0]])
    found = select("sigmoid_topk_renorm", scores, k=2)
    assert found.index_TK.tolist() == [[2, 1], [1, 2]]
    expected = torch.tensor([[0.5, 0.5], [1 / (1 + 1 / torch.e), 1 / (1 + torch.e)]])
    torch.testing.assert_close(found.weight_TK, expected)


def test_rows_of_the_sigmoid_router_start_with_equal_lengths() -> None:
    for options, std in [({}, 64**-0.5), ({"init_std": 0.3}, 0.3)]:
        router = ROUTERS.get("sigmoid").build(64, 50, options)
        for seed in (None, 1):
            if seed is not None:
                router.reset_parameters(torch.Generator().manual_seed(seed))
            lengths = router.get_parameter("scorer.weight").norm(dim=-1)
            torch.testing.assert_close(lengths, lengths[:1].expand(50))
            assert float(router.get_parameter("scorer.weight").detach().std()) == pytest.approx(std, rel=0.05)


def test_expert_dropout_spares_whole_experts_in_training_only() -> None:
    selector = SELECTORS.get("sigmoid_topk").build(6, {"k": 2, "expert_dropout": 0.5})
    scores, dropped = torch.randn(400, 6), []
    for _ in range(60):
        found = selector.train()(scores, context(400))
        assert found.index_TK.shape == (400, 2)
        assert (found.index_TK[:, 0] != found.index_TK[:, 1]).all()
        used = torch.zeros(6).index_fill(0, found.index_TK.reshape(-1), 1.0)
        assert used.sum() >= 2
        dropped.append(6 - used.sum())
    # At least two remain: the expected number of dropped ones is a little below three.
    assert 2.2 < torch.stack(dropped).mean() < 3.2
    found = selector.eval()(scores, context(400))
    assert len(found.index_TK.unique()) == 6
    with pytest.raises(ValueError, match=r"expert_dropout=1.0"):
        SELECTORS.get("sigmoid_topk").build(6, {"expert_dropout": 1.0})


# Groups and the selection bias


def test_without_groups_it_is_plain_top_k() -> None:
    scores = torch.randn(40, 12)
    found = select("group_limited", scores, k=3)
    plain = select("sigmoid_topk_renorm", scores, k=3)
    assert torch.equal(found.index_TK, plain.index_TK)
    torch.testing.assert_close(found.weight_TK, plain.weight_TK)
    soft = select("group_limited", scores, k=3, score="softmax", renormalise=False)
    torch.testing.assert_close(soft.weight_TK, select("softmax_topk", scores, k=3).weight_TK)


@pytest.mark.parametrize("group_score", ["top2", "max"])
def test_experts_come_from_few_groups(group_score: str) -> None:
    scores = torch.randn(200, 12)
    found = select("group_limited", scores, k=3, num_groups=4, topk_groups=2, group_score=group_score)
    groups = [len(set(row)) for row in (found.index_TK // 3).tolist()]
    assert max(groups) == 2
    free = select("group_limited", scores, k=3)
    assert max(len(set(row)) for row in (free.index_TK // 3).tolist()) == 3


def test_the_two_group_scores_differ() -> None:
    scores = torch.tensor([[3.0, -9.0, 2.0, 2.0]])
    options = {"k": 2, "num_groups": 2}
    assert sorted(select("group_limited", scores, group_score="max", **options).index_TK[0].tolist()) == [0, 1]
    assert sorted(select("group_limited", scores, group_score="top2", **options).index_TK[0].tolist()) == [2, 3]


def test_the_bias_selects_and_does_not_weigh() -> None:
    router, x = make_router(("deepseek_v3", {"k": 2, "scale": 2.5})), torch.randn(40, HIDDEN)
    bias = router.get_buffer("selector.selection_bias_E")
    before = router(x, context(40))
    bias.fill_(0.7)
    same = router(x, context(40))
    assert torch.equal(same.index_TK, before.index_TK)
    assert torch.equal(same.weight_TK, before.weight_TK)
    bias.zero_()
    bias[3] = 2.0  # more than any difference of sigmoids: expert 3 is always chosen
    moved = router(x, context(40))
    assert (moved.index_TK == 3).any(-1).all()
    scores = moved.logits_TE.sigmoid().gather(-1, moved.index_TK)
    torch.testing.assert_close(moved.weight_TK, 2.5 * scores / scores.sum(-1, keepdim=True))
    moved.weight_TK.square().sum().backward()
    assert bias.grad is None
    assert "selector.selection_bias_E" in router.state_dict()
    assert "selector.selection_bias_E" not in dict(router.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 5}, "num_groups=5 must divide the 12 experts"),
        ({"num_groups": 4, "topk_groups": 5}, "topk_groups=5 must be between 1 and the 4 groups"),
        ({"num_groups": 4, "topk_groups": 1, "k": 4}, "k=4 must be at most the 3 experts of 1 groups"),
        ({"scale": 0.0}, "scale=0.0 must be above 0"),
        ({"score": "sigmoids"}, "unknown score 'sigmoids'; did you mean 'sigmoid'"),
        ({"group_score": "best"}, "unknown group_score 'best'"),
    ],
)
def test_impossible_groups_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SELECTORS.get("group_limited").build(12, options)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_the_bias_balances_a_skewed_router(name: str) -> None:
    """Loss-free balancing on tokens that prefer one expert: MaxVio falls from step to step, in the mean."""
    layer = make_layer((name, {"k": 1}))
    rate = 0.01 if name == "deepseek_v3" else 0.005
    controller = CONTROLLERS.get("loss_free_bias").build({"rate": rate}, {layer.site: layer})
    with torch.no_grad():
        layer.router.get_parameter("scorer.weight").mul_(0.2)
    x = torch.randn(300, HIDDEN) + 0.5
    violations = []
    for step in range(1, 121):
        stats = LayerStats.measure(layer.router(x, context(300)), torch.ones(300, dtype=torch.bool))
        violations.append(float(stats.load_E.max() / stats.load_E.mean() - 1))
        controller.step(StepStats(step=step, num_steps=120, layers={layer.site: stats}))
    quarters = [sum(violations[i : i + 30]) / 30 for i in range(0, 120, 30)]
    assert violations[0] > 0.5
    assert quarters[0] > quarters[1] >= quarters[3]
    assert quarters[3] < 0.25, quarters


# ReLU


def test_relu_gates_are_continuous_where_an_expert_switches_on() -> None:
    sums = []
    for score in (-1e-6, 0.0, 1e-6):
        found = select("relu", torch.tensor([[score, -1.0, 0.5]]))
        sums.append(float(found.weight_TK.sum()))
        assert (found.index_TK < 3).sum() == (2 if score > 0 else 1)
    assert max(sums) - min(sums) < 1e-5


def test_relu_admits_any_number_of_experts_best_first() -> None:
    scores = torch.tensor([[-1.0, -2.0, -3.0], [1.0, 3.0, 2.0], [-1.0, 4.0, -1.0]])
    found = select("relu", scores)
    assert found.index_TK.tolist() == [[3, 3, 3], [1, 2, 0], [1, 3, 3]]
    assert found.weight_TK.tolist() == [[0, 0, 0], [3, 2, 1], [4, 0, 0]]
    layer = make_layer(("remoe", {}))
    with torch.no_grad():
        layer.router.get_parameter("scorer.weight").fill_(-1.0)
    assert (layer(torch.rand(4, HIDDEN)) == 0).all(), "no expert, no output"


def test_relu_teaches_open_gates_only() -> None:
    scores = torch.randn(20, NUM_EXPERTS, requires_grad=True)
    select("relu", scores).weight_TK.sum().backward()
    torch.testing.assert_close(scores.grad, (scores > 0).float())


# Dense to sparse


def test_fewer_experts_remain_as_the_temperature_falls() -> None:
    selector = SELECTORS.get("dts").build(8, {}).train()
    scores, chosen = torch.randn(500, 8), []
    for temperature in (2.0, 0.5, 0.2, 0.05, 0.0):
        selector.get_buffer("temperature").fill_(temperature)
        found = selector(scores, context(500))
        assert (found.weight_TK.sum(-1) <= 1 + 1e-5).all()
        chosen.append(float((found.index_TK < 8).float().sum(-1).mean()))
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > 7
    assert chosen[-1] == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(found.weight_TK[:, 0], torch.ones(500), rtol=0, atol=0.2)


def test_dts_takes_the_gumbel_distribution_and_no_noise_in_evaluation() -> None:
    """At low temperatures the best expert is drawn with the probabilities of the softmax."""
    scores = torch.tensor([0.2, 0.5, 0.3]).log().expand(20000, 3)
    selector = SELECTORS.get("dts").build(3, {"k": 2, "temperature": 0.05})
    best = selector.train()(scores, context(20000)).index_TK[:, 0]
    shares = torch.zeros(3).scatter_add(0, best, torch.ones(20000)) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.5, 0.3]), rtol=0, atol=0.015)
    found = selector.eval()(scores, context(20000))
    assert (found.index_TK == torch.tensor([1, 2])).all()
    torch.testing.assert_close(found.weight_TK, (scores / 0.05).softmax(-1)[:, [1, 2]])


def test_dts_switches_to_hard_at_its_temperature() -> None:
    selector = SELECTORS.get("dts").build(5, {"temperature": 0.3, "hard_at": 0.3, "k": 2})
    scores = torch.randn(30, 5, requires_grad=True)
    found = selector.train()(scores, context(30))
    assert (found.index_TK[:, 0] < 5).all()
    assert (found.index_TK[:, 1:] == 5).all()
    torch.testing.assert_close(found.weight_TK[:, 0], torch.ones(30))
    found.weight_TK.sum().backward()
    assert scores.grad.abs().sum() > 0, "straight through: the gradient is that of the soft weight"
    torch.testing.assert_close(selector.eval()(scores, context(30)).weight_TK.sum(-1), torch.ones(30))
    selector.get_buffer("temperature").fill_(0.31)
    assert (selector.train()(scores, context(30)).index_TK[:, 1] < 5).any()
    assert (selector.eval()(scores, context(30)).weight_TK.sum(-1) < 0.999).any()


def test_dts_weights_without_the_noise() -> None:
    scores = torch.randn(30, 5)
    found = select("dts", scores, training=True, gumbel_weights=False)
    plain = torch.nn.functional.pad(scores.softmax(-1), (0, 1)).gather(-1, found.index_TK)
    torch.testing.assert_close(found.weight_TK, plain)
    for options, message in [({"temperature": 0.0}, "temperature=0.0"), ({"threshold": 1.0}, "threshold=1.0"),
                             ({"hard_at": -1.0}, "hard_at=-1.0")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            SELECTORS.get("dts").build(5, options)


# Top-p and dense


@pytest.mark.parametrize("p", [0.01, 0.3, 0.6, 0.9])
def test_top_p_is_the_smallest_sufficient_set(p: float) -> None:
    scores = 2 * torch.randn(200, 7)
    found = select("top_p", scores, p=p)
    mass = torch.nn.functional.pad(found.probs_TE, (0, 1)).gather(-1, found.index_TK)
    assert (mass.sum(-1) >= p - 1e-6).all()
    count = (found.index_TK < 7).sum(-1)
    without_last = mass.sum(-1) - mass.gather(-1, (count - 1).unsqueeze(-1)).squeeze(-1)
    assert ((without_last < p) | (count == 1)).all()
    torch.testing.assert_close(found.weight_TK, mass / mass.sum(-1, keepdim=True))
    bounded = select("top_p", scores, p=p, k_max=2)
    assert torch.equal((bounded.index_TK < 7).sum(-1), count.clamp(max=2))


def test_top_p_at_its_ends() -> None:
    scores = torch.randn(50, 7)
    assert torch.equal(select("top_p", scores, p=1e-9).index_TK[:, 0], scores.argmax(-1))
    assert (select("top_p", scores, p=1e-9).index_TK[:, 1:] == 7).all()
    assert (select("top_p", scores, p=1.0).index_TK < 7).all()
    torch.testing.assert_close(select("top_p", scores, p=1.0).weight_TK, select("dense_softmax", scores).weight_TK)
    for options, message in [({"p": 0.0}, "p=0.0"), ({"p": 1.5}, "p=1.5"), ({"k_max": 9}, "k=9")]:
        with pytest.raises(ValueError, match=message):
            SELECTORS.get("top_p").build(7, options)
