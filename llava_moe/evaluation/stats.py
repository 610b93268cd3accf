"""Scores with 95 % intervals: accuracy (Wilson), balanced accuracy and paired differences (bootstrap).

The bootstrap draws the number of each outcome per class at once (binomial or multinomial counts): for the mean of a
few discrete values that is the same distribution as drawing single questions with replacement, and costs nothing.
Classes are resampled apart, so that none is ever empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054
NUM_RESAMPLES = 20_000
SEED = 0

Interval = tuple[float, float]


def accuracy(correct: Sequence[bool]) -> float:
    """Share of correct answers.

    Raises:
        ValueError: there is no answer.
    """
    if not correct:
        raise ValueError("no answers to score")
    return sum(map(bool, correct)) / len(correct)


def wilson_interval(num_correct: float, num_total: int) -> Interval:
    """Wilson's score interval of a proportion (E. B. Wilson, 1927), 95 %.

    For graded answers the sum of their grades may be given: it is then wider than needed, as no grades vary more than
    right and wrong answers of the same mean.

    Raises:
        ValueError: num_total is not positive, or num_correct lies outside 0..num_total.
    """
    if num_total < 1 or not 0 <= num_correct <= num_total:
        raise ValueError(f"{num_correct} correct of {num_total} is no proportion")
    share, z2 = num_correct / num_total, Z_95**2
    centre = (share + z2 / (2 * num_total)) / (1 + z2 / num_total)
    half = Z_95 / (1 + z2 / num_total) * (share * (1 - share) / num_total + z2 / (4 * num_total**2)) ** 0.5
    low = 0.0 if num_correct == 0 else centre - half  # exact at the ends, where rounding would leave 1e-17
    high = 1.0 if num_correct == num_total else centre + half
    return low, high


def balanced_accuracy(correct: Sequence[bool], targets: Sequence[str]) -> float:
    """Mean over the classes of the share of correct answers: 0.5 for a constant answer to yes/no questions."""
    return float(np.mean([np.mean(values) for values in _by_class(correct, targets)]))


def balanced_accuracy_interval(correct: Sequence[bool], targets: Sequence[str], seed: int = SEED) -> Interval:
    """Percentile bootstrap interval of the balanced accuracy, 95 %, resampled within each class."""
    rng = np.random.default_rng(seed)
    recalls = [
        rng.binomial(len(values), values.mean(), NUM_RESAMPLES) / len(values) for values in _by_class(correct, targets)
    ]
    return _percentiles(np.mean(recalls, axis=0))


def paired_difference_interval(
    correct_a: Sequence[bool], correct_b: Sequence[bool], targets: Sequence[str] | None = None, seed: int = SEED
) -> Interval:
    """Paired bootstrap interval, 95 %, of score(a) - score(b) on the same questions.

    Args:
        correct_a: whether model a was right, per question.
        correct_b: the same for model b, in the same order.
        targets: the class of each question for a difference of balanced accuracies; None for plain accuracy.
        seed: of the resampling.

    Raises:
        ValueError: the lengths differ, or there is no question.
    """
    if len(correct_a) != len(correct_b):
        raise ValueError(f"paired comparison of {len(correct_a)} and {len(correct_b)} answers")
    difference = np.asarray(correct_a, dtype=int) - np.asarray(correct_b, dtype=int)
    rng = np.random.default_rng(seed)
    means = []
    for values in _by_class(difference, targets if targets is not None else [""] * len(difference)):
        shares = [float(np.mean(values == outcome)) for outcome in (-1, 0, 1)]
        counts = rng.multinomial(len(values), shares, NUM_RESAMPLES)
        means.append((counts[:, 2] - counts[:, 0]) / len(values))
    return _percentiles(np.mean(means, axis=0))


def _by_class(values: Sequence[bool] | np.ndarray, targets: Sequence[str]) -> list[np.ndarray]:
    if len(values) != len(targets) or not len(targets):
        raise ValueError(f"{len(values)} answers for {len(targets)} targets; there must be as many, and at least one")
    array, classes = np.asarray(values, dtype=float), np.asarray(targets)
    return [array[classes == name] for name in sorted(set(targets))]


def _percentiles(resamples: np.ndarray) -> Interval:
    low, high = np.percentile(resamples, [2.5, 97.5])
    return float(low), float(high)
