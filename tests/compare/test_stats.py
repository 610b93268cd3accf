"""Statistics against scipy, against values by hand, and on simulated answers whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llava_moe.compare import bootstrap, stats, variance
from llava_moe.compare.answers import Answers
from llava_moe.compare.stats import Analysis, Difference, analyse
from llava_moe.compare.student import f_upper, incomplete_beta, t_quantile, t_two_sided
from llava_moe.evaluation import EvaluationError
from tests.compare import simulate


def table(*methods: Any, task: str = "task") -> Answers:
    """From (S, Q) arrays, one for each method; the first is the dense control, the second the random one."""
    scores = np.array(methods, dtype=float)
    names = ("dense", "random", "m2", "m3", "m4", "m5")[: len(methods)]
    return Answers(task, names, tuple(range(scores.shape[1])), tuple(f"q{i}" for i in range(scores.shape[2])), scores)


def to_dense(analysis: Analysis, method: str) -> Difference:
    return next(one for one in analysis.overall.to_dense if one.a == method)


# --- distributions --------------------


def test_quantiles_of_t_known_values() -> None:
    # the usual printed table
    for df, expected in ((1, 12.7062), (2, 4.30265), (4, 2.77645), (12, 2.17881), (1000, 1.96234), (math.inf, 1.95996)):
        assert t_quantile(0.975, df) == pytest.approx(expected, abs=1e-4)
        assert t_two_sided(expected, df) == pytest.approx(0.05, abs=1e-5)
    assert t_quantile(0.025, 2) == -t_quantile(0.975, 2)
    assert t_quantile(0.5, 3) == 0
    assert f_upper(2.92447, 2, 10) == pytest.approx(0.1, abs=1e-5)
    assert incomplete_beta(2, 3, 0.4, 0.6) == pytest.approx(0.5248, abs=1e-12)  # a polynomial: 6x^2 - 8x^3 + 3x^4


def test_distributions_equal_scipys() -> None:
    oracle = pytest.importorskip("scipy.stats")
    for df in (0.7, 1.0, 2.0, 3.3, 12.0, 299.0, 1e5, 3e6, 1e8):
        for probability in (0.501, 0.6, 0.8, 0.975, 0.9958, 0.99999):
            assert t_quantile(probability, df) == pytest.approx(oracle.t.ppf(probability, df), rel=1e-6)
        for t in (1e-9, 0.1, 1.0, 4.0, 30.0):
            assert t_two_sided(-t, df) == pytest.approx(2 * oracle.t.sf(t, df), rel=1e-6, abs=1e-100)
    for f in (0.0, 0.01, 1.0, 3.0, 500.0):
        assert f_upper(f, 2, 10) == pytest.approx(oracle.f.sf(f, 2, 10), rel=1e-10)


@pytest.mark.parametrize("call", [lambda: t_quantile(1.0, 3), lambda: t_quantile(0.9, 0), lambda: t_two_sided(1, -1)])
def test_impossible_arguments_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"probability|degrees of freedom"):
        call()


# --- a difference in its two limits, and Holm --------------------


def test_one_seed_is_the_paired_t_test_over_questions() -> None:
    oracle = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = ((rng.random((1, 2000)) < share).astype(float) for share in (0.72, 0.68))
    found = to_dense(analyse([table(b, a)], "dense", None), "random")
    expected = oracle.ttest_rel(a[0], b[0])
    assert found.p == pytest.approx(expected.pvalue, rel=1e-4)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-6)
    # the sign test (McNemar's exact test) asks the same of the questions that came out differently
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    assert found.p == pytest.approx(oracle.binomtest(only_a, only_a + only_b).pvalue, abs=0.02)
    assert found.num_seeds == 1
    assert not found.shown


def test_one_seed_by_hand() -> None:
    # 6 of 10 questions equal, 3 won, 1 lost: mean 0.2, variance (3 * 0.64 + 1.44 + 6 * 0.04) / 9 = 0.4
    a, b = [1, 1, 1, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    found = to_dense(analyse([table([b], [a])], "dense", None), "random")
    assert (found.value, found.error, found.parts[1].df) == pytest.approx((0.2, 0.2, 9))
    assert found.p == pytest.approx(0.34344, abs=1e-4)  # of t = 1 with 9 degrees of freedom
    assert found.interval == pytest.approx((0.2 - 2.26216 * 0.2, 0.2 + 2.26216 * 0.2), abs=1e-5)


def test_where_questions_do_not_vary_it_is_the_paired_t_test_over_seeds() -> None:
    oracle = pytest.importorskip("scipy.stats")
    seeds_a, seeds_b = np.array([0.61, 0.66, 0.63, 0.69]), np.array([0.58, 0.60, 0.62, 0.61])
    a, b = (np.repeat(values[:, None], 20_000, axis=1) for values in (seeds_a, seeds_b))
    found = to_dense(analyse([table(b, a)], "dense", None), "random")
    assert found.p == pytest.approx(oracle.ttest_rel(seeds_a, seeds_b).pvalue, rel=1e-3)
    assert (found.num_seeds, found.seeds_won) == (4, 4)
    assert found.seed_share == pytest.approx(1, abs=1e-4)


def test_two_way_variance_by_hand() -> None:
    # residuals of the layout are +-0.25 in one half of the questions: MS_question 0.5, MS_rest 0.25, Q = 4, S = 2
    x = np.array([[1, 1, 0, 0.5], [1, 1, 0.5, 0]])
    rest = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    mean_squares = 2 * x.mean(0).var(ddof=1), (rest**2).sum() / 3
    part = variance.question_part([x], floor=False)
    assert part.variance == pytest.approx((mean_squares[0] - mean_squares[1]) / 8)
    assert part.df == pytest.approx(3)
    # over two tasks: the mean of both, each with half the weight
    both = variance.question_part([x, x], floor=False)
    assert both.variance == pytest.approx(part.variance / 2)
    assert both.df == pytest.approx(6)
    # equal answers everywhere: one question in Q + 2 might still have come out otherwise
    assert variance.question_part([np.zeros((2, 4))], floor=True).variance == pytest.approx(1 / 36)


def test_margins_of_two_parts_are_squared_and_added() -> None:
    parts = [variance.Part(0.04, 2), variance.Part(0.01, 12)]
    assert variance.margin(parts, 0.975) == pytest.approx(math.hypot(4.30265 * 0.2, 2.17881 * 0.1), abs=1e-4)
    for p in (0.6, 0.05, 1e-4):  # the p-value undoes the margin
        assert variance.two_sided(parts, -variance.margin(parts, 1 - p / 2)) == pytest.approx(p, rel=1e-3)
    assert variance.two_sided(parts, 0.0) == 1
    assert variance.two_sided([variance.Part(1e-8, 999)], 0.5) == 1e-12


def test_holm_by_hand() -> None:
    # sorted .005, .01, .03, .04: times 4, 3, 2, 1 -> .02, .03, .06, .04, and none below the one before it
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_the_detectable_difference_by_hand() -> None:
    rng = np.random.default_rng(1)
    overall = analyse([simulate.answers(rng, [0.6] * 4, 3, 300)], "dense", "random").overall
    for found, family in ((overall.to_dense, 3), (overall.to_random, 2), (overall.pairs, 6)):
        assert len(found) == family
        for one in found:
            # at 5 % over the family, two-sided, and 80 % of the time
            quantiles = [variance.margin(one.parts, q) for q in (1 - 0.025 / family, 0.8)]
            assert one.detectable == pytest.approx(sum(quantiles))
            assert one.detectable > 2.8 * one.error  # 1.96 + 0.84 with known variances and one comparison


def test_holm_runs_over_the_tables_of_all_tasks() -> None:
    rng = np.random.default_rng(1)
    answers = [simulate.answers(rng, [0.6, 0.6, 0.7], 3, 150, task=f"t{k}") for k in range(3)]
    analysis = analyse(answers, "dense", "random")
    raw = [one.p for task in analysis.tasks for one in task.to_dense]
    assert [one.p_holm for task in analysis.tasks for one in task.to_dense] == pytest.approx(stats.holm(raw))
    assert len(raw) == 6
    assert [one.p_holm for one in analysis.overall.pairs] == pytest.approx(
        stats.holm([one.p for one in analysis.overall.pairs])
    )


# --- seeds: pooled, alone, shared --------------------


def test_pooled_seed_variance_is_the_residual_of_method_and_seed() -> None:
    rng = np.random.default_rng(5)
    mean_MS = 0.6 + 0.02 * rng.normal(size=(5, 3)) + np.array([0.0, 0.1, -0.1])  # what a seed does to all drops out
    rest = mean_MS - mean_MS.mean(1, keepdims=True) - mean_MS.mean(0) + mean_MS.mean()
    residual = variance._residual(mean_MS)
    assert residual == pytest.approx(((rest**2).sum() / 8, 8))
    for a in range(1, 5):
        own = (mean_MS[a] - mean_MS[0]).var(ddof=1) / 3
        part = variance.seed_part_of_difference(mean_MS, a, 0)
        if part.df == 8:
            assert part.variance == pytest.approx(max(own, 2 * residual.variance / 3))
        else:
            assert (part.variance, part.df) == pytest.approx((own, 2))
    # two methods: nothing to pool, the pair's own variance
    pair = variance.seed_part_of_difference(mean_MS[:2], 1, 0)
    assert pair == pytest.approx(((mean_MS[1] - mean_MS[0]).var(ddof=1) / 3, 2))


def test_methods_that_share_what_a_seed_does_are_no_independent_witnesses() -> None:
    together = np.tile([0.5, 0.6, 0.7], (4, 1)) + np.arange(4)[:, None] / 100  # one seed effect, seen four times
    assert variance._within(together) == pytest.approx((0.01, 2))
    apart = np.random.default_rng(0).normal(0.6, 0.05, (400, 3))
    assert variance._within(apart).df == pytest.approx(800, rel=0.05)
    assert variance._within(apart).variance == pytest.approx(0.0025, rel=0.1)


def test_an_unstable_method_stands_alone() -> None:
    steady = [[0.60, 0.61, 0.60], [0.62, 0.61, 0.62], [0.60, 0.60, 0.61], [0.61, 0.62, 0.61], [0.6, 0.61, 0.61]]
    wild = [0.4, 0.6, 0.75]
    mean_MS = np.array([*steady, wild])
    alone = variance.seed_part_of_difference(mean_MS, 5, 0)
    assert alone == pytest.approx(((mean_MS[5] - mean_MS[0]).var(ddof=1) / 3, 2))
    assert variance.seed_part_of_difference(mean_MS, 1, 0).df == 10
    assert variance.seed_part_of_score(mean_MS, 5) == pytest.approx((mean_MS[5].var(ddof=1) / 3, 2))


def test_seeds_that_move_all_methods_alike_count_for_scores_and_not_for_differences() -> None:
    rng = np.random.default_rng(2)
    own = 0.5 + 0.01 * rng.normal(size=(5, 5, 1)) + 0.05 * rng.normal(size=(5, 5, 300))
    order = np.array([-0.1, 0.05, 0.1, 0.0, -0.05])[:, None]
    calm, moved = (analyse([table(*np.clip(own + shift, 0, 1))], "dense", "random").overall for shift in (0, order))

    def width(interval: tuple[float, float]) -> float:
        return interval[1] - interval[0]

    assert width(moved.scores["dense"].interval) > 2 * width(calm.scores["dense"].interval)
    for one, other in zip(moved.to_dense, calm.to_dense, strict=True):
        assert width(one.interval) == pytest.approx(width(other.interval), rel=1e-6)


def test_planted_seed_variance_widens_and_says_so() -> None:
    errors, shares = [], []
    for sd in (0.0, 0.1, 0.4):
        rng = np.random.default_rng(3)
        runs = [analyse([simulate.answers(rng, [0.7] * 6, 3, 600, seed_sd=sd)], "dense", "random") for _ in range(4)]
        found = [one for run in runs for one in run.overall.to_dense]
        errors.append(np.mean([one.error for one in found]))
        shares.append(np.mean([one.seed_share for one in found]))
        assert all(one.detectable > 2.5 * one.error for one in found)
    assert errors[0] < errors[1] < errors[2] / 2
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.8


def test_a_failed_cell_leaves_the_others_to_speak() -> None:
    rng = np.random.default_rng(4)
    whole = simulate.answers(rng, [0.6, 0.6, 0.75, 0.6], 4, 500)
    scores = whole.scores_MSQ.copy()
    scores[2, 1] = np.nan
    scores[3] = np.nan
    holed = Answers(whole.task, whole.methods, whole.seeds, whole.questions, scores)
    result = analyse([holed], "dense", "random").overall
    assert list(result.scores["m2"].by_seed) == [0, 2, 3]
    assert result.scores["m2"].value == pytest.approx(whole.scores_MSQ[2, [0, 2, 3]].mean())
    found = next(one for one in result.to_dense if one.a == "m2")
    expected = (whole.scores_MSQ[2] - whole.scores_MSQ[0])[[0, 2, 3]].mean()
    assert found.value == pytest.approx(expected)
    assert (found.num_seeds, found.shown) == (3, True)
    assert result.left_out == ("m3",)


def test_a_method_that_failed_on_one_task_keeps_its_other_scores() -> None:
    rng = np.random.default_rng(4)
    first, second = (simulate.answers(rng, [0.6, 0.6, 0.7], 3, 100, task=task) for task in ("a", "b"))
    second.scores_MSQ[2] = np.nan
    analysis = analyse([first, second], "dense", "random")
    assert analysis.overall.left_out == ("m2",)
    assert [one.a for one in analysis.overall.to_dense] == ["random"]
    assert "m2" in analysis.tasks[0].scores
    assert "m2" not in analysis.tasks[1].scores


def test_the_mean_over_tasks_weighs_small_tasks_like_large_ones() -> None:
    small, large = np.ones((3, 2, 10)), np.zeros((3, 2, 1000))
    large[:, :, :100] = 1
    result = analyse([table(*small, task="small"), table(*large, task="large")], "dense", "random")
    assert result.overall.scores["dense"].value == pytest.approx(0.55)
    assert [task.scores["m2"].value for task in result.tasks] == pytest.approx([1, 0.1])
    low, high = result.tasks[0].scores["dense"].interval  # ten right of ten is no certainty
    assert 0.6 < low < 0.75
    assert high == 1
    assert result.overall.num_questions == 1010


def test_bootstrap_equals_plain_resampling() -> None:
    rng = np.random.default_rng(6)
    scores = simulate.answers(rng, [0.7, 0.6], 4, 80, seed_sd=0.3).scores_MSQ
    drawn = []
    for _ in range(4000):
        seeds, questions = rng.integers(0, 4, 4), rng.integers(0, 80, 80)
        drawn.append(scores[:, seeds][:, :, questions].mean(axis=(1, 2)))
    expected = np.percentile(drawn, [2.5, 97.5], axis=0)
    assert pytest.approx(expected, abs=0.012) == np.array(bootstrap.bootstrap_intervals([scores])).T


# --- refusals --------------------


def test_cells_become_a_table() -> None:
    cells = {("dense", 1): {"x": 1.0, "y": 0.0}, ("dense", 0): {"y": 1.0, "x": 0.5}, ("m", 1): {"x": 0.0, "y": 1.0}}
    answers = Answers.from_cells("t", cells, ["dense", "gone", "m"], [0, 1])
    assert (answers.methods, answers.seeds, answers.questions) == (("dense", "gone", "m"), (0, 1), ("x", "y"))
    np.testing.assert_array_equal(answers.scores_MSQ[0], [[0.5, 1], [1, 0]])
    np.testing.assert_array_equal(answers.scores_MSQ[2, 1], [0, 1])
    assert np.isnan(answers.scores_MSQ[1]).all()
    assert np.isnan(answers.scores_MSQ[2, 0]).all()
    with pytest.raises(EvaluationError, match="'m', seed 1 is no cell of the matrix"):
        Answers.from_cells("t", cells, ["dense"], [0, 1])


def test_other_questions_are_refused() -> None:
    cells = {("dense", 0): {"x": 1.0, "y": 0.0}, ("m", 0): {"x": 1.0, "z": 0.0}}
    with pytest.raises(EvaluationError, match=r"'t': 'dense' \(seed 0\) and 'm' \(seed 0\).*2 in one only, e.g. 'y'"):
        Answers.from_cells("t", cells, ["dense", "m"], [0])
    with pytest.raises(EvaluationError, match="no cell"):
        Answers.from_cells("t", {}, ["dense"], [0])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[[0.0, 2.0]]], "0 to 2"),
        ([[[0.0, math.nan]]], "'dense', seed 0 has answers to some questions only"),
        ([[[0.5]]], "1 questions"),
    ],
)
def test_bad_answers_are_refused(scores: Sequence[Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        table(*scores)


def test_missing_controls_and_unequal_tables_are_refused() -> None:
    one = table(np.ones((2, 5)), np.ones((2, 5)))
    with pytest.raises(EvaluationError, match="dense control 'other' is not among"):
        analyse([one], "other", None)
    with pytest.raises(EvaluationError, match="different methods or seeds"):
        analyse([one, table(np.ones((3, 5)), np.ones((3, 5)), task="b")], "dense", None)
    with pytest.raises(EvaluationError, match="no task"):
        analyse([], "dense", None)
    gone = one.scores_MSQ.copy()
    gone[0] = np.nan
    with pytest.raises(EvaluationError, match="dense control 'dense' has no cell"):
        analyse([Answers("task", one.methods, one.seeds, one.questions, gone)], "dense", None)
