"""Always-valid statistics against hand arithmetic, brute force and simulation."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import integrate, stats

from moe_serve.rollout import sequential as sq

ALPHA = 0.05


def test_beta_binomial_by_hand() -> None:
    """Uniform prior, no event in n: the mixture is 1/(n+1), so M = 1/((n+1)(1-p)^n)."""
    found = sq.log_beta_binomial(0, 9, 0.2, prior=1.0)
    assert found == pytest.approx(-math.log(10 * 0.8**9))


@pytest.mark.parametrize(
    ("k", "n"), [(0, 50), (0.5, 50), (1, 50), (3, 50), (25, 50), (50, 50), (1.5, 700.25)]
)
def test_ends_are_where_the_martingale_reaches_its_limit(k: float, n: float) -> None:
    """M(end) = 1/alpha, or the end is that of the unit interval."""
    found = sq.rate_interval(k, n, ALPHA)
    assert 0.0 <= found.lower <= k / n <= found.upper <= 1.0
    for end in (found.lower, found.upper):
        if 1e-9 < end < 1 - 1e-9:
            assert sq.log_beta_binomial(k, n, end) == pytest.approx(math.log(1 / ALPHA), abs=1e-5)


def test_nothing_seen_says_nothing() -> None:
    """Without data every interval is everything and every e-value 1."""
    assert sq.rate_interval(0, 0, ALPHA) == sq.Interval(0.0, 1.0)
    assert sq.betting_interval([], ALPHA) == sq.Interval(0.0, 1.0)
    assert sq.bernstein_interval([], ALPHA) == sq.Interval(0.0, 1.0)
    assert float(sq.log_share_e_process(0, 0, 0.1)) == pytest.approx(0.0, abs=1e-12)
    assert float(sq.log_split_e_process([0, 0], [0.9, 0.1])) == pytest.approx(0.0, abs=1e-12)


def test_null_share_by_hand() -> None:
    """At 10 % of the traffic and twice the rate: 0.2 / (0.2 + 0.9)."""
    assert sq.null_share(0.1, 2.0) == pytest.approx(0.2 / 1.1)
    assert sq.null_share(0.5, 1.0) == 0.5


def test_share_e_process_is_the_integral_it_says() -> None:
    """Brute force: quadrature of likelihood ratio times the cut-off density."""
    k, n, p0 = 4, 9, 0.15
    density = stats.beta(0.5, 0.5)

    def integrand(p: float) -> float:
        ratio = (p / p0) ** k * ((1 - p) / (1 - p0)) ** (n - k)
        return ratio * float(density.pdf(p)) / float(density.sf(p0))

    value, _ = integrate.quad(integrand, p0, 1.0)
    assert float(sq.log_share_e_process(k, n, p0)) == pytest.approx(math.log(value), rel=1e-6)


@pytest.mark.parametrize("p", [0.05, 0.12, 0.15])
def test_share_e_process_expects_at_most_one(p: float) -> None:
    """Exact sum over all outcomes of eight events, for rates of the null and on its edge."""
    k = np.arange(9)
    expected = np.exp(sq.log_share_e_process(k, 8, 0.15)) @ stats.binom(8, p).pmf(k)
    assert expected <= 1.0 + 1e-9
    if p == 0.15:
        assert expected == pytest.approx(1.0)


def test_split_by_hand() -> None:
    """Prior (1, 1), ten to nothing at one half: B(11, 1) / 2^-10 = 1024 / 11."""
    found = sq.log_split_e_process([10, 0], [0.5, 0.5], strength=1.0)
    assert float(found) == pytest.approx(math.log(1024 / 11))


def test_splits_are_judged_row_by_row() -> None:
    """Prior (1, 1): one of each has B(2, 2) / (1/4) = 4/6; a row knows nothing of the others."""
    found = sq.log_split_e_process([[10, 0], [1, 1], [0, 10]], [0.5, 0.5], strength=1.0)
    assert np.exp(found) == pytest.approx([1024 / 11, 2 / 3, 1024 / 11])


def test_split_expects_one_over_three_arms() -> None:
    """Exact: all outcomes of four requests."""
    weights = np.array([0.7, 0.2, 0.1])
    total = 0.0
    for arms in product(range(3), repeat=4):
        counts = np.bincount(arms, minlength=3)
        total += float(np.prod(weights**counts) * np.exp(sq.log_split_e_process(counts, weights)))
    assert total == pytest.approx(1.0)


def test_coverage_of_rates_at_all_times() -> None:
    """2,000 streams of 2,000 requests: the truth leaves the sequence in at most 5 %, ever."""
    rng = np.random.default_rng(0)
    for p in (0.002, 0.05, 0.5):
        k = np.cumsum(rng.random((2000, 2000)) < p, axis=1)
        left = (sq.log_beta_binomial(k, np.arange(1, 2001), p) >= math.log(1 / ALPHA)).any(axis=1)
        assert left.mean() <= ALPHA


def test_a_fixed_sample_test_would_fail_that() -> None:
    """The same peeking with a z-test at 1.96: wrong far more often than one time in twenty."""
    rng = np.random.default_rng(0)
    n = np.arange(1, 2001)
    k = np.cumsum(rng.random((1000, 2000)) < 0.5, axis=1)
    z = np.abs(k - n / 2) / np.sqrt(n / 4)
    assert (z[:, 30:] > 1.96).any(axis=1).mean() > 0.3


@pytest.mark.parametrize("shape", [(10.0, 30.0), (0.5, 0.5)])
def test_coverage_of_bets(shape: tuple[float, float]) -> None:
    """400 streams of 500 bounded values: capital against the true mean stays below 1/alpha."""
    rng = np.random.default_rng(1)
    mean = shape[0] / sum(shape)
    broke = 0
    for _ in range(400):
        x = rng.beta(*shape, size=500)
        broke += bool((sq.log_capital(x, mean, ALPHA) >= math.log(1 / ALPHA)).any())
    assert broke / 400 <= ALPHA


def test_bets_are_narrower_than_bernstein_and_both_hold_the_mean() -> None:
    """Beta(10, 30), mean 1/4, as in the paper's figures; both narrower than Hoeffding by far."""
    x = np.random.default_rng(2).beta(10, 30, size=2000)
    bets, bernstein = sq.betting_interval(x, ALPHA), sq.bernstein_interval(x, ALPHA)
    for found in (bets, bernstein):
        assert found.lower < 0.25 < found.upper
    assert bets.upper - bets.lower < bernstein.upper - bernstein.lower < 0.05


def test_bernstein_by_hand_for_one_value() -> None:
    """One value: stake sqrt(2 log 40 / (1/4 log 2)) cut to 1/2; psi = log 2 - 1/2."""
    found = sq.bernstein_interval([0.5], ALPHA)
    radius = (math.log(40) + 0.0 * (math.log(2) - 0.5)) / 0.5
    assert found == sq.Interval(max(0.0, 0.5 - radius), min(1.0, 0.5 + radius))


def test_pairs_are_scaled_both_ways() -> None:
    """Differences of exactly 1/2 with bound 2 are values of 5/8 on the unit interval."""
    pairs = sq.paired_interval([0.5] * 40, ALPHA, bound=2.0)
    unit = sq.betting_interval([0.625] * 40, ALPHA)
    assert pairs.lower == pytest.approx(4 * unit.lower - 2)
    assert pairs.lower < 0.5 < pairs.upper


def test_pairs_that_have_all_been_seen_leave_no_doubt() -> None:
    """Three of three: their mean is (0.5 - 0.5 + 0.3) / 3, exactly; of four, it is not known."""
    whole = sq.paired_interval([0.5, -0.5, 0.3], ALPHA, population=3)
    assert whole.lower == whole.upper == pytest.approx(0.1)
    # The fourth lies in [-1, 1], so the mean in [(0.3 - 1) / 4, (0.3 + 1) / 4].
    most = sq.paired_interval([0.5, -0.5, 0.3], ALPHA, population=4)
    assert (most.lower, most.upper) == pytest.approx((-0.175, 0.325))


def test_a_mean_narrower_than_the_grid_still_has_an_interval() -> None:
    """A constant, many times over."""
    found = sq.betting_interval([0.33335] * 20_000, ALPHA, grid=50)
    assert found.lower <= 0.33335 <= found.upper
