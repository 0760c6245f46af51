"""Always-valid statistics: looked at after every request, they err as rarely as looked at once.

The controller looks all the time, so a test for a fixed sample size would be wrong by
construction. Everything here is a pure function whose guarantee holds at all times together, by
Ville's inequality: a non-negative supermartingale that starts at 1 exceeds 1/alpha with
probability alpha at most, ever. Counts may be fractions (dependent requests count as fewer).

Names: ``k`` events among ``n`` trials; ``alpha`` the probability of ever being wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]

_PRIOR: Final = 0.5
"""Of both Beta parameters. Jeffreys' prior loses ½·log n against the best rate in hindsight, where
the uniform one loses log n for rates near zero, where errors live."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence sequence's present value."""

    lower: float
    upper: float


def log_beta_binomial(k: ArrayLike, n: ArrayLike, p: ArrayLike, prior: float = _PRIOR) -> Array:
    """Log of the mixture martingale against the rate ``p``.

    Robbins 1970, "Statistical methods related to the law of the iterated logarithm", the method
    of mixtures with a Beta mixing density: ∫ q^k (1-q)^(n-k) dBeta(q) / (p^k (1-p)^(n-k)).
    """
    k, n, p = (np.asarray(v, dtype=np.float64) for v in (k, n, p))
    mixed = special.betaln(prior + k, prior + n - k) - special.betaln(prior, prior)
    return np.asarray(mixed - special.xlogy(k, p) - special.xlog1py(n - k, -p))


def upper_rate(k: float, n: float, alpha: float) -> float:
    """Upper end of the confidence sequence for a rate: all p with martingale below 1/alpha.

    The log-likelihood is concave in p, so Newton's method from the outside falls onto the end
    monotonically; it starts at the nearer of the Hoeffding and Chernoff ends, which lie outside.
    """
    if n <= 0:
        return 1.0
    if k >= n:
        return 1.0
    rate = k / n
    floor = (
        special.betaln(_PRIOR + k, _PRIOR + n - k)
        - special.betaln(_PRIOR, _PRIOR)
        + math.log(alpha)
    )
    top = (k * math.log(rate) if k > 0 else 0.0) + (n - k) * math.log1p(-rate)
    gap = (top - floor) / n
    p = min(
        rate + math.sqrt(gap / 2.0),
        rate + gap + math.sqrt(gap * gap + 2.0 * rate * gap),
        1.0 - 1e-12,
    )
    for _ in range(60):
        value = (k * math.log(p) if k > 0 else 0.0) + (n - k) * math.log1p(-p) - floor
        slope = k / p - (n - k) / (1.0 - p)
        step = value / slope
        p -= step
        if step <= 1e-12 * p:
            break
    return float(p)


def lower_rate(k: float, n: float, alpha: float) -> float:
    """Lower end of the confidence sequence for a rate."""
    return 1.0 - upper_rate(n - k, n, alpha)


def rate_interval(k: float, n: float, alpha: float) -> Interval:
    """Beta-binomial confidence sequence for a rate, both ends (see :func:`log_beta_binomial`)."""
    return Interval(lower_rate(k, n, alpha), upper_rate(k, n, alpha))


def null_share(weight: float, ratio: float) -> float:
    """Greatest P(a failure came from pruned | a failure) while pruned fails ≤ ratio × as often.

    With a share ``w`` of the requests and rates r and s the share of failures is
    wr / (wr + (1-w)s), which r ≤ ratio·s bounds by w·ratio / (w·ratio + 1 - w).
    """
    return weight * ratio / (weight * ratio + 1.0 - weight)


def log_share_e_process(k: ArrayLike, n: ArrayLike, p0: float) -> Array:
    """Log e-process against "at most ``p0`` of the events are of this kind".

    A mixture of likelihood ratios over alternatives p > p0 with Jeffreys' density cut off there.
    For each of them the factor of one event, (p/p0)^x ((1-p)/(1-p0))^(1-x), has an expectation
    that grows with the true rate and is 1 at p0, so it is a supermartingale under the whole null
    (Ramdas, Grünwald, Vovk & Shafer 2023, "Game-theoretic statistics and safe anytime-valid
    inference", section 3). No events: log 1 = 0, no evidence.
    """
    k, n = (np.asarray(v, dtype=np.float64) for v in (k, n))
    above = special.betaincc(_PRIOR + k, _PRIOR + n - k, p0)
    with np.errstate(divide="ignore"):
        cut = np.log(above) - np.log(special.betaincc(_PRIOR, _PRIOR, p0))
    return np.asarray(log_beta_binomial(k, n, p0) + cut)


def log_split_e_process(counts: ArrayLike, weights: ArrayLike, strength: float = 2.0) -> Array:
    """Log e-process against "the traffic was split by ``weights``" (sample-ratio mismatch).

    Lindon & Malek 2022, "Anytime-valid inference for multinomial count data" (NeurIPS), section 2:
    Bayes factor of a Dirichlet prior centred on the weights against the weights themselves.

    Args:
        counts: ``[..., arms]``.
        weights: ``[arms]``, positive, summing to 1.
        strength: the prior's total concentration, in requests per arm.
    """
    counts, weights = (np.asarray(v, dtype=np.float64) for v in (counts, weights))
    prior = strength * weights.size * weights
    total = counts.sum(axis=-1)
    factor = special.gammaln(prior.sum()) - special.gammaln(prior.sum() + total)
    cells = special.gammaln(prior + counts) - special.gammaln(prior)
    return np.asarray(factor + (cells - special.xlogy(counts, weights)).sum(axis=-1))


def _predictable(x: Array, alpha: float) -> tuple[Array, Array]:
    """Running means of the past, and the stakes : each uses only what came before.

    Both from Waudby-Smith & Ramdas 2024; ``λ_t = √(2·log(2/alpha) / (v_{t-1} · t · log(1+t)))``.
    """
    t = np.arange(1, x.size + 1, dtype=np.float64)
    mean = (0.5 + np.cumsum(x)) / (t + 1.0)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (t + 1.0)
    past_mean = np.concatenate([[0.5], mean[:-1]])
    past_variance = np.concatenate([[0.25], variance[:-1]])
    return past_mean, np.sqrt(2.0 * math.log(2.0 / alpha) / (past_variance * t * np.log1p(t)))


def bernstein_interval(x: ArrayLike, alpha: float) -> Interval:
    """Predictable-mixture empirical-Bernstein confidence sequence for a mean in [0, 1].

    Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting" (JRSS B),
    Theorem 2. Closed form, linear time; :func:`betting_interval` is narrower.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.size == 0:
        return Interval(0.0, 1.0)
    past_mean, stake = _predictable(x, alpha)
    stake = np.minimum(stake, 0.5)
    spread = (x - past_mean) ** 2 @ (-np.log1p(-stake) - stake)
    centre = stake @ x / stake.sum()
    radius = (math.log(2.0 / alpha) + spread) / stake.sum()
    return Interval(max(0.0, float(centre - radius)), min(1.0, float(centre + radius)))


def log_capital(
    x: ArrayLike, mean: ArrayLike, alpha: float, population: int | None = None
) -> Array:
    """Log of the hedged capital that bets against each ``mean`` have grown to, after each value.

    Waudby-Smith & Ramdas 2024, Theorem 3, with θ = ½ and truncation c = ½:
    max(½ Π(1 + λ⁺(X-m)), ½ Π(1 - λ⁻(X-m))), λ⁺ ≤ c/m, λ⁻ ≤ c/(1-m).

    Where the values are drawn without replacement from ``population`` many (section 5 there), m is
    the mean of those not yet drawn, m_t = (N·m - Σ_{i<t} X_i) / (N - t + 1); a mean that asks for
    an impossible one is bet away at once.

    Returns:
        ``[means, values]``.
    """
    x = np.asarray(x, dtype=np.float64)
    m = np.atleast_1d(np.asarray(mean, dtype=np.float64))[:, None]
    impossible = np.zeros((m.shape[0], x.size), dtype=bool)
    if population is not None:
        left = population - np.arange(x.size, dtype=np.float64)
        m = (population * m - (np.cumsum(x) - x)) / left
        impossible = np.logical_or.accumulate((m < -1e-9) | (m > 1.0 + 1e-9), axis=1)
        m = np.clip(m, 0.0, 1.0)
    _, stake = _predictable(x, alpha)
    up = np.minimum(stake, 0.5 / np.maximum(m, 1e-12))
    down = np.minimum(stake, 0.5 / np.maximum(1.0 - m, 1e-12))
    gained = np.cumsum(np.log1p(up * (x - m)), axis=1)
    lost = np.cumsum(np.log1p(-down * (x - m)), axis=1)
    return np.asarray(np.where(impossible, np.inf, np.maximum(gained, lost) - math.log(2.0)))


def betting_interval(
    x: ArrayLike, alpha: float, grid: int = 1000, population: int | None = None
) -> Interval:
    """Hedged-capital confidence sequence for a mean in [0, 1]: means not yet bet away.

    The capital against a mean is quasi-convex in it, so what is left is an interval; the ends
    are rounded outwards to the grid.

    Args:
        x: values in [0, 1].
        alpha: probability of ever being wrong.
        grid: steps of the unit interval.
        population: size of the finite set that the values are drawn from, in random order and
            without replacement, and whose mean is sought. Once all are seen the mean is known.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.size == 0:
        return Interval(0.0, 1.0)
    least, most = 0.0, 1.0
    if population is not None:
        # What is not yet drawn lies between nothing and everything.
        least, most = float(x.sum()) / population, 1.0 - float((1.0 - x).sum()) / population
        if x.size >= population:
            return Interval(float(x.mean()), float(x.mean()))
    m = np.linspace(0.0, 1.0, grid + 1)
    capital = log_capital(x, m, alpha, population)[:, -1]
    left: Any = np.flatnonzero(capital < math.log(1.0 / alpha))
    if left.size == 0:
        # Narrower than the grid: around the mean.
        centre = min(max(float(x.mean()), least), most)
        low, high = centre - 1.0 / grid, centre + 1.0 / grid
    else:
        low, high = float(m[max(0, left[0] - 1)]), float(m[min(grid, left[-1] + 1)])
    return Interval(max(low, least), min(high, most))


def paired_interval(
    differences: ArrayLike, alpha: float, bound: float = 1.0, population: int | None = None
) -> Interval:
    """Betting confidence sequence for a mean of paired differences in [-bound, bound]."""
    x = (np.asarray(differences, dtype=np.float64) / bound + 1.0) / 2.0
    found = betting_interval(x, alpha, population=population)
    return Interval(bound * (2.0 * found.lower - 1.0), bound * (2.0 * found.upper - 1.0))
