"""95 % intervals of scores that are no mean over questions: F1 (POPE), sums over pairs (MME), means of categories.

Each is a percentile bootstrap over what the official score is made of (questions, or pairs of questions), within the
strata that the score has. Each also returns the score itself, which must agree with the official one. Where a stratum
has fewer than `FEWEST` units there is no interval: a bootstrap of so few is far too narrow (and of one a point).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llava_moe.evaluation.stats import NUM_RESAMPLES, SEED, Interval

Logged = Mapping[str, Any]
Estimate = tuple[float, Interval | None]
FEWEST = 10


def f1(metric: str) -> Callable[[Sequence[Logged]], Estimate]:
    """F1 of the answer yes, as lmms-eval has it: an answer that is neither yes nor no counts nowhere."""

    def estimate(samples: Sequence[Logged]) -> Estimate:
        rows = [(sample[metric]["ground_truth"], sample[metric]["prediction"]) for sample in samples]
        kinds = (("yes", "yes"), ("no", "yes"), ("yes", "no"))  # true positive, false positive, false negative
        counts = [rows.count(kind) for kind in kinds]
        shares = np.array([*counts, len(rows) - sum(counts)]) / len(rows)
        value = float(_f1(np.array([counts]))[0])
        if min(sum(truth == answer for truth, _ in rows) for answer in ("yes", "no")) < FEWEST:
            return value, None
        drawn = np.random.default_rng(SEED).multinomial(len(rows), shares, NUM_RESAMPLES)
        return value, _percentiles(_f1(drawn))

    return estimate


def _f1(counts: np.ndarray) -> np.ndarray:
    """Of rows of (true positives, false positives, false negatives, ...); 0 without a true positive."""
    hits, errors = counts[:, 0].astype(float), counts[:, 1] + counts[:, 2]
    return np.divide(2 * hits, 2 * hits + errors, out=np.zeros(len(counts)), where=hits > 0)


def mean_of_means(metric: str, stratum: str) -> Callable[[Sequence[Logged]], Estimate]:
    """The mean over categories of their mean scores (MMStar)."""

    def estimate(samples: Sequence[Logged]) -> Estimate:
        rows = [sample[metric] for sample in samples]
        value, drawn = _sum_of_means((row[stratum], float(row["score"])) for row in rows)
        number = len({row[stratum] for row in rows})
        return value / number, None if drawn is None else _percentiles(drawn / number)

    return estimate


def pairs(*metrics: str) -> Callable[[Sequence[Logged]], Estimate]:
    """MME's points: the sum over categories of the mean over pairs of accuracy and of both right, 200 at most each."""

    def estimate(samples: Sequence[Logged]) -> Estimate:
        rows = [sample[metric] for sample in samples for metric in metrics if isinstance(sample.get(metric), Mapping)]
        found: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            found.setdefault((row["category"], str(row["question_id"])), []).append(float(row["score"]))
        points = ((category, 50 * sum(scores) + 100 * (sum(scores) == 2)) for (category, _), scores in found.items())
        value, drawn = _sum_of_means(points)
        return value, None if drawn is None else _percentiles(drawn)

    return estimate


def _sum_of_means(values: Iterable[tuple[str, float]]) -> tuple[float, np.ndarray | None]:
    """The sum over strata of the mean of each, and resamples of it: each stratum is resampled within itself."""
    strata: dict[str, list[float]] = {}
    for name, value in values:
        strata.setdefault(name, []).append(value)
    value = sum(float(np.mean(found)) for found in strata.values())
    if min(map(len, strata.values())) < FEWEST:
        return value, None
    rng, drawn = np.random.default_rng(SEED), np.zeros(NUM_RESAMPLES)
    for name in sorted(strata):
        outcomes, counts = np.unique(strata[name], return_counts=True)
        number = int(counts.sum())
        drawn += rng.multinomial(number, counts / number, NUM_RESAMPLES) @ outcomes / number
    return value, drawn


def _percentiles(resamples: np.ndarray) -> Interval:
    low, high = np.percentile(resamples, [2.5, 97.5])
    return float(low), float(high)
