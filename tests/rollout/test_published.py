"""The statistics against values that are not ours.

The betting sequence against ``confseq`` 0.0.11, the authors' own package (its C++ part needs a
compiler and Boost, so it is no dependency; ``confseq.betting`` is plain Python, and what it gave
for the values below is written down here). And the published formulas once more, value by value
in 50 digits or in exact fractions, where the product works on arrays of logarithms.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from moe_serve.rollout.sequential import (
    bernstein_interval,
    betting_interval,
    log_beta_binomial,
    log_capital,
    log_split_e_process,
)

VALUES = np.array([(37 * i) % 101 / 100 for i in range(1, 41)]) ** 2
"""Forty in [0, 1], mean 0.34634."""
ALPHA = 0.05
AT = (0, 9, 39)

CONFSEQ = {
    # (mean, population): log(betting_mart(VALUES, mean, alpha=0.05, N=population)) at AT.
    (0.1, None): (-0.5238264359432423, 3.386087704974306, 9.345179121718994),
    (0.3, None): (-0.5829483882618698, -1.0072551534131884, -1.3307559732757324),
    (0.5, None): (-0.38338566296528503, 0.4319662817737656, 3.235688835227148),
    (0.1, 60): (-0.5238264359432423, 3.702336647209833, math.inf),
    (0.3, 60): (-0.5829483882618698, -1.021293464713517, -0.5883119755952178),
    (0.5, 60): (-0.38338566296528503, 0.6019989027270329, 6.777498966819033),
}


@pytest.mark.parametrize(("mean", "population"), CONFSEQ)
def test_capital_is_that_of_confseq(mean: float, population: int | None) -> None:
    """With and without replacement; a mean that has become impossible is bet away for good."""
    found = log_capital(VALUES, mean, ALPHA, population)[0, list(AT)]
    assert found == pytest.approx(CONFSEQ[mean, population], rel=1e-12)


@pytest.mark.parametrize(
    ("population", "lower", "upper"), [(None, 0.215, 0.494), (60, 0.25, 0.436)]
)
def test_intervals_are_those_of_confseq(population: int | None, lower: float, upper: float) -> None:
    """``betting_cs(VALUES, alpha=0.05, breaks=1000, N=population)`` after the fortieth.

    Ours rounds its ends outwards to the same grid, by at most one step of 0.001.
    """
    found = betting_interval(VALUES, ALPHA, grid=1000, population=population)
    assert lower - 0.0011 <= found.lower <= lower + 1e-9
    assert upper - 1e-9 <= found.upper <= upper + 0.0011


def stakes() -> list[tuple[Decimal, Decimal]]:
    """(mean, stake) before each value, as Waudby-Smith & Ramdas 2024 choose them from the past.

    mean_t = (1/2 + sum X) / (t + 1), variance_t = (1/4 + sum (X - mean)²) / (t + 1),
    stake_t = sqrt(2 log(2/alpha) / (variance_{t-1} t log(1 + t))).
    """
    found = []
    total, squares = Decimal("0.5"), Decimal("0.25")
    mean, variance = total, squares
    for t, value in enumerate(map(Decimal, VALUES), start=1):
        level = 2 * (2 / Decimal(ALPHA)).ln()
        found.append((mean, (level / (variance * t * Decimal(1 + t).ln())).sqrt()))
        total += value
        mean = total / (t + 1)
        squares += (value - mean) ** 2
        variance = squares / (t + 1)
    return found


@pytest.mark.parametrize("mean", [0.05, 0.25, 0.35, 0.6])
def test_capital_by_hand_in_fifty_digits(mean: float) -> None:
    """Theorem 3: half of the product of 1 + stake (X - m), the other half of 1 - stake (X - m)."""
    with localcontext(prec=50):
        m, up, down = Decimal(mean), Decimal("0.5"), Decimal("0.5")
        for value, (_, stake) in zip(map(Decimal, VALUES), stakes(), strict=True):
            up *= 1 + min(stake, 1 / (2 * m)) * (value - m)
            down *= 1 - min(stake, 1 / (2 * (1 - m))) * (value - m)
        expected = float(max(up, down).ln())
    assert log_capital(VALUES, mean, ALPHA)[0, -1] == pytest.approx(expected, rel=1e-12)


def test_bernstein_by_hand_in_fifty_digits() -> None:
    """Theorem 2: (sum of stakes times X ± (log(2/alpha) + sum of (X - mean)² psi)) / sum of stakes.

    psi = -log(1 - stake) - stake, stakes cut at one half.
    """
    with localcontext(prec=50):
        weight = weighted = spread = Decimal(0)
        for value, (mean, stake) in zip(map(Decimal, VALUES), stakes(), strict=True):
            cut = min(stake, Decimal("0.5"))
            weight += cut
            weighted += cut * value
            spread += (value - mean) ** 2 * (-(1 - cut).ln() - cut)
        radius = ((2 / Decimal(ALPHA)).ln() + spread) / weight
        low, high = float(weighted / weight - radius), float(weighted / weight + radius)
    found = bernstein_interval(VALUES, ALPHA)
    assert (found.lower, found.upper) == pytest.approx((low, high), rel=1e-12)


def rising(start: Fraction, count: int) -> Fraction:
    """Product of start, start + 1, ..., so many factors: a ratio of Gamma functions, exactly."""
    return math.prod((start + i for i in range(count)), start=Fraction(1))


def log(value: Fraction) -> float:
    """Of a ratio of whole numbers of any size."""
    return math.log(value.numerator) - math.log(value.denominator)


@pytest.mark.parametrize(
    ("k", "n", "p"), [(0, 7, 0.5), (3, 11, 0.25), (0, 900, 0.01), (41, 900, 0.03)]
)
def test_beta_binomial_in_exact_fractions(k: int, n: int, p: float) -> None:
    """Robbins' mixture under Jeffreys' prior, whose Gamma functions are products.

    B(k + 1/2, n - k + 1/2) / B(1/2, 1/2) = (1/2)_k (1/2)_{n-k} / n!.
    """
    half = Fraction(1, 2)
    mixed = rising(half, k) * rising(half, n - k) / math.factorial(n)
    exact = mixed / (Fraction(p) ** k * (1 - Fraction(p)) ** (n - k))
    assert float(log_beta_binomial(k, n, p)) == pytest.approx(log(exact), rel=1e-11, abs=1e-11)


def test_split_in_exact_fractions() -> None:
    """Lindon & Malek's Bayes factor, three arms: prior 6 w, so (6 w_i)_{n_i} / (6)_n / w_i^n_i."""
    weights = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]
    counts = [420, 310, 95]
    exact = 1 / rising(Fraction(6), sum(counts))
    for weight, count in zip(weights, counts, strict=True):
        exact *= rising(6 * weight, count) / weight**count
    found = float(log_split_e_process(counts, [float(w) for w in weights]))
    assert found == pytest.approx(log(exact), rel=1e-10)
