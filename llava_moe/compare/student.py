"""Tails and quantiles of Student's t and Fisher's F in plain Python, so that reports need no scipy (the tests do)."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

_NORMAL_FROM = 1e7  # degrees of freedom from which on t is the normal distribution to all digits shown
_SERIES_FROM = 500  # and from which on four terms of a series give its quantiles to 1e-6
_TINY = 1e-300


def t_two_sided(t: float, df: float) -> float:
    """Probability that |T| is at least |t|.

    Raises:
        ValueError: df is not positive.
    """
    _check(df)
    if math.isinf(t):
        return 0.0
    if df >= _NORMAL_FROM:
        return math.erfc(abs(t) / math.sqrt(2))
    return incomplete_beta(df / 2, 0.5, df / (df + t * t), t * t / (df + t * t))


@lru_cache(maxsize=4096)  # reports ask for the same few again and again
def t_quantile(probability: float, df: float) -> float:
    """The value below which T lies with this probability.

    Newton's method for the logarithm of the tail over the logarithm of t, which is nearly straight in heavy tails.

    Raises:
        ValueError: the probability lies outside (0, 1), or df is not positive.
    """
    if not 0 < probability < 1:
        raise ValueError(f"a probability lies between 0 and 1, not at {probability}")
    _check(df)
    if probability == 0.5:
        return 0.0
    if probability < 0.5:
        return -t_quantile(1 - probability, df)
    value, tail = NormalDist().inv_cdf(probability), 1 - probability
    if df >= _SERIES_FROM:  # Abramowitz and Stegun 26.7.5
        z = value
        first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
        third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + first / df + second / df**2 + third / df**3
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    for _ in range(100):
        now = t_two_sided(value, df) / 2
        density = math.exp(constant - (df + 1) / 2 * math.log1p(value * value / df))
        step = math.log(now / tail) * now / (density * value)
        value *= math.exp(min(max(step, -2.0), 2.0))
        if abs(step) < 1e-8:  # the next step would be its square
            return value
    raise ArithmeticError(f"no quantile of t found for {probability} with {df} degrees of freedom")


def f_upper(f: float, df_above: float, df_below: float) -> float:
    """Probability that F is at least f."""
    if f <= 0:
        return 1.0
    whole = df_below + df_above * f
    return incomplete_beta(df_below / 2, df_above / 2, df_below / whole, df_above * f / whole)


def incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22).

    Args:
        x: between 0 and 1.
        rest: 1 - x, given apart so that none of its digits is lost.
    """
    if x <= 0 or rest <= 0:
        return 0.0 if x <= 0 else 1.0
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    )  # the common factor x^a (1 - x)^b / B(a, b)
    if x < (a + 1) / (a + b + 2):  # where the fraction converges fast
        return front * _fraction(a, b, x) / a
    return 1 - front * _fraction(b, a, rest) / b


def _fraction(a: float, b: float, x: float) -> float:
    """1 / (1 + d1 / (1 + d2 / ...)) from the front (Lentz's method)."""
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > _TINY else _TINY)
    value = d
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 + term * d, 1 + term / c
            d = 1 / (d if abs(d) > _TINY else _TINY)
            c = c if abs(c) > _TINY else _TINY
            change = c * d
            value *= change
        if abs(change - 1) < 1e-15:
            return value
    raise ArithmeticError(f"the incomplete beta function did not converge for {a}, {b}, {x}")


def _check(df: float) -> None:
    if not df > 0:
        raise ValueError(f"degrees of freedom must be positive, not {df}")
