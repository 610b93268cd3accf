"""Variances of a mean over seeds and questions, in independent parts with their degrees of freedom.

Legend: M methods, S seeds, Q questions. `stats.py` says what they are for and what was measured of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llava_moe.compare.student import f_upper, t_quantile

_ALONE_BELOW = 0.1  # p of the F-test below which a comparison's own seed variance is not mixed with the others'
_LEAST_P = 1e-12  # smaller ones are not told apart


class Part(NamedTuple):
    """An independent part of a variance, with its degrees of freedom."""

    variance: float
    df: float


def combine(parts: Sequence[Part]) -> tuple[float, float]:
    """The sum, with Satterthwaite's degrees of freedom."""
    total = sum(part.variance for part in parts)
    if total <= 0:
        return 0.0, math.inf
    return total, total**2 / sum(part.variance**2 / part.df for part in parts if part.variance > 0)


def margin(parts: Sequence[Part], probability: float) -> float:
    """The quantile of the sum of independent errors: the quantiles of each, squared and added.

    (Howe, 1974; Zou and Donner's MOVER, 2008.) Exact with one part. Satterthwaite's single t is too small far out in
    the tails, where a correction for many comparisons asks: it hides the two degrees of freedom of one part behind the
    many of the other.
    """
    return math.sqrt(sum(t_quantile(probability, part.df) ** 2 * part.variance for part in parts if part.variance > 0))


def two_sided(parts: Sequence[Part], value: float) -> float:
    """The p at which the margin is |value|; found on the logarithm of p, by halving."""
    low, high = math.log(_LEAST_P), 0.0
    if value == 0:
        return 1.0
    if margin(parts, 1 - _LEAST_P / 2) <= abs(value):
        return _LEAST_P
    while high - low > 1e-4:  # relative precision of p
        middle = (low + high) / 2
        wider = margin(parts, 1 - math.exp(middle) / 2) > abs(value)
        low, high = (middle, high) if wider else (low, middle)
    return math.exp((low + high) / 2)


def question_part(tables: Sequence[np.ndarray], floor: bool) -> Part:
    """The questions' share of the variance of a mean over tasks.

    Args:
        tables: (S, Q) for each task.
        floor: for differences: not below that of one question in Q + 2 that came out unlike the others (the pseudo-pair
            of Agresti and Min, 2005), so that two methods with equal answers to 20 questions are not called equal.
    """
    parts = []
    for x_SQ in tables:
        S, Q = x_SQ.shape
        seeds, questions = x_SQ.mean(axis=1, keepdims=True), x_SQ.mean(axis=0, keepdims=True)
        mean_square = S * float(questions.var(ddof=1))
        if S > 1:
            rest = x_SQ - seeds - questions + x_SQ.mean()
            mean_square -= float((rest**2).sum()) / ((S - 1) * (Q - 1))
        variance = max(mean_square / (S * Q), 1 / (Q + 2) ** 2 if floor else 0.0)
        parts.append(Part(variance / len(tables) ** 2, Q - 1))
    return Part(*combine(parts))


def _residual(mean_MS: np.ndarray) -> Part:
    """Mean square of what method + seed leave of the seeds' means, some of which may be missing."""
    method, seed = np.nonzero(~np.isnan(mean_MS))
    design = np.zeros((len(method), sum(mean_MS.shape)))
    design[np.arange(len(method)), method] = 1
    design[np.arange(len(method)), len(mean_MS) + seed] = 1
    df = len(method) - int(np.linalg.matrix_rank(design)) if len(method) else 0
    if df < 1:
        return Part(0.0, 0.0)
    values = mean_MS[method, seed]
    rest = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return Part(float((rest**2).sum()) / df, df)


def _within(mean_MS: np.ndarray) -> Part:
    """Variance over seeds of one method, pooled over methods.

    Its degrees of freedom are those of M methods whose seeds' means share a part (the data order): with correlation r,
    sum(S_m - 1) / (1 + (M - 1) r^2).
    """
    squares, df = 0.0, 0
    for row in mean_MS:
        values = row[~np.isnan(row)]
        if len(values) > 1:
            squares, df = squares + float(((values - values.mean()) ** 2).sum()), df + len(values) - 1
    if not df or not squares:
        return Part(0.0, df)
    shared = max(0.0, 1 - _residual(mean_MS).variance / (squares / df))
    return Part(squares / df, df / (1 + (len(mean_MS) - 1) * shared**2))


def _choose(own: Part, pooled: Part, others: Part) -> Part:
    """The larger of its own and the pooled variance; its own alone where it is plainly another than the others'."""
    if pooled.df <= 0:
        return Part(0.0, 1.0)  # a single seed: nothing is known about others, and `Difference.shown` is False
    if own.df <= 0:
        return pooled
    if others.df <= 0 or others.variance <= 0:
        return own
    alone = f_upper(own.variance / others.variance, own.df, others.df) < _ALONE_BELOW
    return own if alone else Part(max(own.variance, pooled.variance), pooled.df)


def seed_part_of_difference(mean_MS: np.ndarray, a: int, b: int) -> Part:
    both = ~np.isnan(mean_MS[a] - mean_MS[b])
    count, difference = int(both.sum()), (mean_MS[a] - mean_MS[b])[both]
    own = Part(float(difference.var(ddof=1)) / 2 if count > 1 else 0.0, count - 1)  # / 2: of one method, as the pooled
    others = _residual(np.delete(mean_MS, [a, b], axis=0))
    part = _choose(own, _residual(mean_MS), others)
    return Part(2 * part.variance / count, part.df)


def seed_part_of_score(mean_MS: np.ndarray, m: int) -> Part:
    values = mean_MS[m][~np.isnan(mean_MS[m])]
    own = Part(float(values.var(ddof=1)) if len(values) > 1 else 0.0, len(values) - 1)
    part = _choose(own, _within(mean_MS), _within(np.delete(mean_MS, m, axis=0)))
    return Part(part.variance / len(values), part.df)
