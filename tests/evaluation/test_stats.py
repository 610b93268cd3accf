"""Statistics against hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest

from llava_moe.evaluation import stats


def test_wilson_interval_known_values() -> None:
    # centre and half width by hand for 8 of 10: (0.8 + 0.19207) / 1.38415 = 0.71673 and 0.22659
    assert stats.wilson_interval(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    assert stats.wilson_interval(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-4)
    # at the ends: 0 and z^2 / (n + z^2)
    assert stats.wilson_interval(0, 20) == pytest.approx((0.0, 3.84146 / 23.84146), abs=1e-5)
    assert stats.wilson_interval(20, 20) == pytest.approx((20 / 23.84146, 1.0), abs=1e-5)


@pytest.mark.parametrize(("num_correct", "num_total"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_interval_refuses_impossible_counts(num_correct: int, num_total: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        stats.wilson_interval(num_correct, num_total)


def test_balanced_accuracy_is_the_mean_recall() -> None:
    targets = ["yes"] * 8 + ["no"] * 2
    always_yes = [True] * 8 + [False] * 2
    assert stats.accuracy(always_yes) == 0.8
    assert stats.balanced_accuracy(always_yes, targets) == 0.5
    assert stats.balanced_accuracy([True] * 4 + [False] * 4 + [True, True], targets) == 0.75


def test_balanced_accuracy_interval_matches_the_normal_limit() -> None:
    targets = ["yes"] * 400 + ["no"] * 400
    correct = ([True] * 320 + [False] * 80) + ([True] * 240 + [False] * 160)
    # variance of the mean of two recalls: (0.8 * 0.2 + 0.6 * 0.4) / 400 / 4
    half = 1.96 * (0.4 / 400 / 4) ** 0.5
    assert stats.balanced_accuracy_interval(correct, targets) == pytest.approx((0.7 - half, 0.7 + half), abs=0.003)
    assert stats.balanced_accuracy_interval(correct, targets) == stats.balanced_accuracy_interval(correct, targets)


def test_paired_interval_matches_plain_resampling_of_questions() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(150) < 0.8, rng.random(150) < 0.7
    difference = a.astype(int) - b.astype(int)
    resampled = [difference[rng.integers(0, 150, 150)].mean() for _ in range(4000)]
    expected = np.percentile(resampled, [2.5, 97.5])
    assert stats.paired_difference_interval(a.tolist(), b.tolist()) == pytest.approx(expected, abs=0.012)


def test_paired_interval_is_narrower_than_unpaired_ones_and_zero_for_equal_answers() -> None:
    same = [True, False] * 50
    assert stats.paired_difference_interval(same, same) == (0.0, 0.0)
    low, high = stats.paired_difference_interval([True] * 60 + [False] * 40, [False] * 60 + [False] * 40)
    assert 0.49 < low < 0.6 < high < 0.71


def test_paired_interval_by_class_weighs_both_classes_alike() -> None:
    targets = ["yes"] * 90 + ["no"] * 10
    a = [True] * 90 + [False] * 10  # always yes
    b = [False] * 90 + [True] * 10  # always no: the balanced accuracies are equal
    assert stats.paired_difference_interval(a, b, targets) == (0.0, 0.0)
    assert stats.paired_difference_interval(a, b)[0] > 0.6


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        stats.paired_difference_interval([True, True], [True])
    with pytest.raises(ValueError, match="2 answers for 1 targets"):
        stats.balanced_accuracy([True, True], ["yes"])
    with pytest.raises(ValueError, match="no answers"):
        stats.accuracy([])
