"""How many tokens an expert must be able to take: the bounds of LocMoE, LocMoE+ and MoE++ as plain functions.

LocMoE (2401.13920) and LocMoE+ (2406.00023) ask how probable it is that a token resembles an expert's direction by more
than a cosine of delta. For a random unit vector of width D,

    p_delta = P(|cos| > delta) = 1 - I_{delta^2}(1/2, (D - 1) / 2)          I: the regularised incomplete beta function
    ec_min  = 1 / (N p_delta)                                               least capacity of an expert
            ~ 1 / (N erfc(sqrt(delta^2 D / (2 - delta^2))))                 approximation, below 1 % off from D = 2048
            > exp(delta^2 D / (2 - delta^2)) / N                            lower bound; C_min of LocMoE+
"""

from __future__ import annotations

import math

_TERMS = 2000  # of the continued fraction; it converges in about sqrt(D) of them


def p_delta(hidden: int, delta: float) -> float:
    """Probability that a random direction of width `hidden` has a cosine beyond +-delta with a given one.

    Raises:
        ValueError: `hidden` is below 2, or `delta` lies outside 0..1.
    """
    _check(1, hidden, delta)
    if delta in (0.0, 1.0):
        return 1.0 - delta
    a, b, x = 0.5, (hidden - 1) / 2, delta * delta
    # The fraction converges fast on one side of the mean only; the other side is its complement.
    if x > (a + 1) / (a + b + 2):
        return _incomplete_beta(b, a, 1 - x)
    return 1 - _incomplete_beta(a, b, x)


def ec_min(num_experts: int, hidden: int, delta: float) -> float:
    """Least capacity 1 / (N p_delta) of LocMoE.

    Raises:
        ValueError: as `p_delta`; or there is no expert.
    """
    _check(num_experts, hidden, delta)
    return 1 / (num_experts * p_delta(hidden, delta))


def ec_min_erfc(num_experts: int, hidden: int, delta: float) -> float:
    """The approximation of `ec_min` by the complementary error function.

    Raises:
        ValueError: as `ec_min`.
    """
    _check(num_experts, hidden, delta)
    return 1 / (num_experts * math.erfc(math.sqrt(_exponent(hidden, delta))))


def ec_min_exp(num_experts: int, hidden: int, delta: float) -> float:
    """The exponential lower bound of `ec_min`; LocMoE+ follows it with the largest cosine measured as `delta`.

    Raises:
        ValueError: as `ec_min`.
    """
    _check(num_experts, hidden, delta)
    return math.exp(_exponent(hidden, delta)) / num_experts


def heterogeneous_capacity(
    num_slots: float, num_ffn: int, num_zero_compute: int, tau: float, factor: float
) -> tuple[float, float]:
    """Capacities of one feed-forward and of one zero-computation expert in MoE++ (2410.07348).

        C_ffn = factor tau S / (tau N_ffn + N_zc)        C_zc = factor S / (tau N_ffn + N_zc)

    S is the number of slots (tokens times k): all capacities together then hold `factor` times what there is.

    Raises:
        ValueError: a count is negative or both are 0; `tau` or `factor` is not positive.
    """
    if min(num_ffn, num_zero_compute) < 0 or num_ffn + num_zero_compute < 1:
        raise ValueError(f"num_ffn={num_ffn} and num_zero_compute={num_zero_compute} must be counts, one above 0")
    if tau <= 0 or factor <= 0:
        raise ValueError(f"tau={tau} and factor={factor} must be above 0")
    each = factor * num_slots / (tau * num_ffn + num_zero_compute)
    return tau * each, each


def _check(num_experts: int, hidden: int, delta: float) -> None:
    if num_experts < 1 or hidden < 2:
        raise ValueError(f"num_experts={num_experts} must be at least 1 and hidden={hidden} at least 2")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta={delta} must be a cosine between 0 and 1")


def _exponent(hidden: int, delta: float) -> float:
    return delta * delta * hidden / (2 - delta * delta)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by its continued fraction (DLMF 8.17.22), evaluated from the last term to the first."""
    fraction = 1.0
    for n in range(_TERMS, 0, -1):
        m = n // 2
        if n % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + term / fraction
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / (a * fraction)
