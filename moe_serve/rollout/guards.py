"""Each guard's difference, pruned - original, as an interval against its margin.

The lower end holds at the rolling-back level, which is split over all tests of a rollout; the
upper end at the advancing level, which is not split because all guards must pass together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from moe_serve.rollout.policy import LatencyGuard, Part, Policy, ShareGuard, Step
from moe_serve.rollout.sequential import (
    log_share_e_process,
    log_split_e_process,
    lower_rate,
    null_share,
    upper_rate,
)
from moe_serve.rollout.window import Pair, Window
from moe_serve.serving.variants import ORIGINAL, PRUNED, VARIANTS

Verdict = Literal["harm", "fine", "open"]
_MOST: Final = 1_000_000.0
"""Times the data so far, beyond which "more of it" is no advice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What one guard knows now."""

    guard: str
    verdict: Verdict
    """``harm`` is proven, ``fine``: harm is excluded, or still ``open``."""
    lower: float
    upper: float
    margin: float
    limit: float
    """Below which ``upper`` must come to leave this step: margin times slack."""
    pruned: tuple[float, float]
    """(events, requests)."""
    original: tuple[float, float]
    basis: str
    """What the pruned variant was compared with."""
    factor: float | None = None
    """Times the data so far that should do, if rates stay; ``None``: no amount would."""
    said: str = ""
    """What was seen, in words, where it is no count of events among requests."""
    needs: str = ""
    """What an open verdict waits for, where that is not requests."""

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


def _smallest_factor(passes: Callable[[float], bool]) -> float | None:
    """How many times the data, at the same rates, are enough; to about 2 %."""
    high = 1.0
    while not passes(high):
        high *= 2.0
        if high > _MOST:
            return None
    low = high / 2.0
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def errors(window: Window, policy: Policy, step: Step, *, explain: bool) -> Evidence:
    """Failures at the proxy: a difference of rates, and the share of failures that is pruned's."""
    guard = policy.guards.errors
    failed_p, total_p = _scaled(window.failures[PRUNED], effect(window, policy, PRUNED))
    failed_o, total_o = _scaled(window.failures[ORIGINAL], effect(window, policy, ORIGINAL))
    back, ahead = policy.alpha / policy.tests / 2.0, policy.alpha_advance / 2.0
    limit = guard.margin * step.slack

    def upper(times: float) -> float:
        return upper_rate(failed_p * times, total_p * times, ahead) - lower_rate(
            failed_o * times, total_o * times, ahead
        )

    lower = lower_rate(failed_p, total_p, back / 2.0) - upper_rate(failed_o, total_o, back / 2.0)
    top = upper(1.0)
    exposure, evidence = _exposure(window), 0.0
    if 0.0 < exposure < 1.0:
        most = null_share(exposure, guard.ratio)
        evidence = float(log_share_e_process(failed_p, failed_p + failed_o, most))
    harm = lower > guard.margin or (evidence >= -math.log(back) and top >= guard.margin)
    verdict: Verdict = "harm" if harm else "fine" if top < limit else "open"
    factor = None
    if explain and verdict == "open":
        factor = _smallest_factor(lambda times: upper(times) < limit)
    return Evidence(
        guard="errors",
        verdict=verdict,
        lower=lower,
        upper=top,
        margin=guard.margin,
        limit=limit,
        pruned=(window.failures[PRUNED][0], window.failures[PRUNED][1]),
        original=(window.failures[ORIGINAL][0], window.failures[ORIGINAL][1]),
        basis=f"original; its failures {_odds(evidence)} for a ratio above {guard.ratio:g}"
        + _widened(window, policy),
        factor=factor,
    )


def _odds(log_value: float) -> str:
    return f"speak {math.exp(min(log_value, 700.0)):.3g} : 1"


def _exposure(window: Window) -> float:
    """Share of the requests counted that pruned gets; a shadow copy is counted on both sides."""
    if window.weight:
        return window.weight / 100.0
    return window.shadow / (100.0 + window.shadow)


def latency(
    metric: str, guard: LatencyGuard, window: Window, policy: Policy, step: Step, *, explain: bool
) -> Evidence:
    """Share of requests over an objective, within strata of concurrency or against the objective.

    The intervals of all strata hold together (a union bound over a number fixed beforehand), so
    they may be weighted by what was seen.
    """
    size = {variant: effect(window, policy, variant) for variant in VARIANTS}
    strata = [
        {v: _scaled(pairs[v], size[v]) for v in VARIANTS}
        for _, pairs in sorted(window.over.get(metric, {}).items())
    ]
    total = {v: _sum([pairs[v] for pairs in strata]) for v in VARIANTS}
    shared = [pairs for pairs in strata if pairs[PRUNED][1] > 0 and pairs[ORIGINAL][1] > 0]
    comparable = sum(pairs[PRUNED][1] for pairs in shared)
    relative = guard.compare == "original" and 2.0 * comparable >= total[PRUNED][1] > 0
    # Which of the two ways is used depends on the data: each has half of the level.
    back = policy.alpha / policy.tests / 2.0
    ahead = policy.alpha_advance / 2.0
    limit = guard.margin * step.slack
    number = len(policy.strata) + 1

    def bounds(times: float) -> tuple[float, float]:
        if not relative:
            k, n = (v * times for v in total[PRUNED])
            # Where the original is slower than allowed itself, pruned is not to blame for as much.
            slow, seen = (v * times for v in total[ORIGINAL])
            worst = upper_rate(slow, seen, back / 2.0)
            tolerated = max(guard.allowed, worst) if seen > 0 else guard.allowed
            return (
                lower_rate(k, n, back / 2.0) - tolerated,
                upper_rate(k, n, ahead) - guard.allowed,
            )
        mass = [1.0 / (1.0 / s[PRUNED][1] + 1.0 / s[ORIGINAL][1]) for s in shared]
        low = high = 0.0
        for pairs, weight in zip(shared, mass, strict=True):
            (kp, np_), (ko, no) = (tuple(v * times for v in pairs[a]) for a in (PRUNED, ORIGINAL))
            each = back / (2.0 * number)
            low += weight * (lower_rate(kp, np_, each) - upper_rate(ko, no, each))
            each = ahead / (2.0 * number)
            high += weight * (upper_rate(kp, np_, each) - lower_rate(ko, no, each))
        return low / sum(mass), high / sum(mass)

    lower, upper = bounds(1.0)
    verdict: Verdict = "harm" if lower > guard.margin else "fine" if upper < limit else "open"
    factor = None
    if explain and verdict == "open" and total[PRUNED][1] > 0:
        factor = _smallest_factor(lambda times: bounds(times)[1] < limit)
    edge = window.edges.get(metric, guard.objective)
    against = f"original in {len(shared)} strata of concurrency" if relative else "the objective"
    return Evidence(
        guard=metric,
        verdict=verdict,
        lower=lower,
        upper=upper,
        margin=guard.margin,
        limit=limit,
        pruned=(total[PRUNED][0] * size[PRUNED], total[PRUNED][1] * size[PRUNED]),
        original=(total[ORIGINAL][0] * size[ORIGINAL], total[ORIGINAL][1] * size[ORIGINAL]),
        basis=f"{against}, requests over {edge:g} s{_widened(window, policy)}",
        factor=factor,
    )


def share(
    name: Part, guard: ShareGuard, window: Window, policy: Policy, step: Step, *, explain: bool
) -> Evidence:
    """Share of answers, or of votes, of a kind: the difference of two rates."""
    pairs = window.shares.get(name, {})
    seen = {v: pairs.get(v, [0.0, 0.0]) for v in VARIANTS}
    scaled = {v: _scaled(seen[v], effect(window, policy, v)) for v in VARIANTS}
    back, ahead = policy.alpha / policy.tests / 2.0, policy.alpha_advance / 2.0
    limit = guard.margin * step.slack

    def upper(times: float) -> float:
        (kp, np_), (ko, no) = (tuple(v * times for v in scaled[a]) for a in (PRUNED, ORIGINAL))
        return upper_rate(kp, np_, ahead) - lower_rate(ko, no, ahead)

    lower = lower_rate(*scaled[PRUNED], back) - upper_rate(*scaled[ORIGINAL], back)
    top = upper(1.0)
    verdict: Verdict = "harm" if lower > guard.margin else "fine" if top < limit else "open"
    none = [v for v in VARIANTS if scaled[v][1] <= 0]
    factor = None
    if explain and verdict == "open" and not none:
        factor = _smallest_factor(lambda times: upper(times) < limit)
    unit = {"feedback": "votes"}.get(name, "answers")
    edge = f" of at most {window.edges[name]:g} tokens" if name in window.edges else ""
    return Evidence(
        guard=name,
        verdict=verdict,
        lower=lower,
        upper=top,
        margin=guard.margin,
        limit=limit,
        pruned=(seen[PRUNED][0], seen[PRUNED][1]),
        original=(seen[ORIGINAL][0], seen[ORIGINAL][1]),
        basis=f"original, {unit}{edge}{_widened(window, policy)}",
        factor=factor,
        needs=f"{unit} of {' and '.join(none)}: none yet" if none and verdict == "open" else "",
    )


def effect(window: Window, policy: Policy, variant: str) -> float:
    """What a variant's counts are divided by, because requests of one user are alike.

    Kish 1965, "Survey Sampling", section 8.2: 1 + (m-1)·r, with m the mean number of requests of a
    request's user and r the correlation of two of them (``dependence``).
    """
    return max(policy.design_effect, 1.0 + policy.dependence * (window.per_user(variant) - 1.0))


def _widened(window: Window, policy: Policy) -> str:
    size = effect(window, policy, PRUNED)
    return f"; users are sticky, {size:.1f} requests count as one" if size > 1.05 else ""


def _scaled(pair: Pair, size: float) -> tuple[float, float]:
    """Counts in independent requests.

    Probes are taken off by their own count, which may be one ahead of the engine's.
    """
    trials = max(pair[1], 0.0)
    return min(max(pair[0], 0.0), trials) / size, trials / size


def _sum(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(k for k, _ in pairs), sum(n for _, n in pairs)


def split_mismatch(window: Window, policy: Policy) -> str:
    """Why the traffic is not split as asked; empty where it may well be."""
    share = window.weight / 100.0
    if not 0.0 < share < 1.0:
        return ""
    counts: list[Pair] = [window.failures[ORIGINAL], window.failures[PRUNED]]
    # All requests of a user fall on one side: of these each user counts once.
    size = max(policy.design_effect, window.per_user(ORIGINAL, PRUNED))
    seen = [pair[1] / size for pair in counts]
    if float(log_split_e_process(seen, [1.0 - share, share])) < -math.log(policy.alpha_split):
        return ""
    part = 100.0 * counts[1][1] / (counts[0][1] + counts[1][1])
    return f"{part:.2f} % of the requests reached pruned where {window.weight:g} % should"
