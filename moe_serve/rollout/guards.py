"""Each guard's difference, pruned - original, as an interval against its margin.

The lower end holds at the rolling-back level, which is split over all tests of a rollout; the
upper end at the advancing level, which is not split because all guards must pass together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from moe_serve.rollout.margins import COUNTED_BY, LatencyGuard, Part, ShareGuard
from moe_serve.rollout.policy import Policy, Step
from moe_serve.rollout.said import codes, say
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
Unit = Literal["share", "nats"]
_MOST: Final = 1_000_000.0
"""Times the data so far, beyond which "more of it" is no advice."""
_OF: Final = {"people": "basis-votes", "proxy": "basis-requests", "engine": "basis-answers"}
"""What a share is one of, by who counts it."""
_NEARLY: Final = 1.05
"""Requests that count as one, up to which nothing is said of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What one guard knows now."""

    guard: str
    unit: Unit
    """Of ``lower``, ``upper``, ``margin`` and ``limit``: a share of one, or nats per token."""
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
        """For the record: with its sentences for other languages beside them."""
        said = {name: codes(getattr(self, name)) for name in ("basis", "said", "needs")}
        values = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "codes": {name: found for name, found in said.items() if found}}


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Compared:
    """Two variants' counts and the ends of their difference, before they are judged."""

    guard: str
    margin: float
    limit: float
    counts: Mapping[str, tuple[float, float]]
    """Variant → (events, requests), as they were seen."""
    lower: float
    upper: Callable[[float], float]
    """The upper end with so many times the data."""
    basis: str
    proven: bool = False
    """Harm, by a test besides the interval."""
    needs: str = ""

    def judged(self, *, explain: bool) -> Evidence:
        """The verdict, and with ``explain`` how much more would do."""
        top, known = self.upper(1.0), self.counts[PRUNED][1] > 0.0
        harm = self.lower > self.margin or (self.proven and top >= self.margin)
        verdict: Verdict = "harm" if harm else "fine" if top < self.limit else "open"
        factor = None
        if explain and verdict == "open" and known:
            factor = _smallest_factor(lambda times: self.upper(times) < self.limit)
        return Evidence(
            guard=self.guard,
            unit="share",
            verdict=verdict,
            lower=self.lower,
            upper=top,
            margin=self.margin,
            limit=self.limit,
            pruned=self.counts[PRUNED],
            original=self.counts[ORIGINAL],
            basis=self.basis,
            factor=factor,
            needs=self.needs if verdict == "open" else "",
        )


def errors(window: Window, policy: Policy, step: Step, *, explain: bool) -> Evidence:
    """Failures at the proxy: a difference of rates, and the share of failures that is pruned's."""
    guard = policy.guards.errors
    scaled = {v: _scaled(window.failures[v], effect(window, policy, v)) for v in VARIANTS}
    # Half of the level for each of two tests.
    back = policy.alpha / policy.tests / 2.0
    exposure, evidence = _exposure(window), 0.0
    if split_mismatch(window, policy):
        # Clients that choose for themselves count as well: by what was seen, not by what was asked.
        exposure = max(exposure, scaled[PRUNED][1] / (scaled[PRUNED][1] + scaled[ORIGINAL][1]))
    if 0.0 < exposure < 1.0:
        failed, all_failed = scaled[PRUNED][0], scaled[PRUNED][0] + scaled[ORIGINAL][0]
        most = null_share(exposure, guard.ratio)
        evidence = float(log_share_e_process(failed, all_failed, most))
    odds = math.exp(min(evidence, 700.0))
    return _Compared(
        guard="errors",
        margin=guard.margin,
        limit=guard.margin * step.slack,
        counts={v: (window.failures[v][0], window.failures[v][1]) for v in VARIANTS},
        lower=_least(scaled, back / 2.0),
        upper=lambda times: _most(scaled, policy.alpha_advance / 2.0, times),
        basis=_basis(say("basis-errors", odds=odds, ratio=guard.ratio), window, policy),
        proven=evidence >= -math.log(back),
    ).judged(explain=explain)


def _least(counts: Mapping[str, tuple[float, float]], alpha: float) -> float:
    """Lower end of the difference of two rates, each rate's end at ``alpha``."""
    return lower_rate(*counts[PRUNED], alpha) - upper_rate(*counts[ORIGINAL], alpha)


def _most(counts: Mapping[str, tuple[float, float]], alpha: float, times: float) -> float:
    """Upper end of it, with so many times the data."""
    pruned, original = (_times(counts[variant], times) for variant in (PRUNED, ORIGINAL))
    return upper_rate(*pruned, alpha) - lower_rate(*original, alpha)


def _times(pair: tuple[float, float], times: float) -> tuple[float, float]:
    return pair[0] * times, pair[1] * times


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
    mass = [1.0 / (1.0 / s[PRUNED][1] + 1.0 / s[ORIGINAL][1]) for s in shared]
    share = 2.0 * (len(policy.strata) + 1)

    def mean(ends: list[float]) -> float:
        return sum(w * end for w, end in zip(mass, ends, strict=True)) / sum(mass)

    def upper(times: float) -> float:
        if relative:
            return mean([_most(pairs, ahead / share, times) for pairs in shared])
        return upper_rate(*_times(total[PRUNED], times), ahead) - guard.allowed

    if relative:
        lower = mean([_least(pairs, back / share) for pairs in shared])
    else:
        # Where the original is slower than allowed itself, pruned is not to blame for as much.
        slow = upper_rate(*total[ORIGINAL], back / 2.0) if total[ORIGINAL][1] > 0 else 0.0
        lower = lower_rate(*total[PRUNED], back / 2.0) - max(guard.allowed, slow)
    edge = window.edges.get(metric, guard.objective)
    against = (
        say("basis-strata", strata=len(shared), edge=edge)
        if relative
        else say("basis-objective", edge=edge)
    )
    return _Compared(
        guard=metric,
        margin=guard.margin,
        limit=guard.margin * step.slack,
        counts={v: _times(total[v], size[v]) for v in VARIANTS},
        lower=lower,
        upper=upper,
        basis=_basis(against, window, policy),
    ).judged(explain=explain)


def share(
    name: Part, guard: ShareGuard, window: Window, policy: Policy, step: Step, *, explain: bool
) -> Evidence:
    """Share of answers, or of votes, of a kind: the difference of two rates."""
    pairs = window.shares.get(name, {})
    seen = {v: pairs.get(v, [0.0, 0.0]) for v in VARIANTS}
    scaled = {v: _scaled(seen[v], effect(window, policy, v)) for v in VARIANTS}
    none = [v for v in VARIANTS if scaled[v][1] <= 0]
    counter = COUNTED_BY[name]
    basis = say(_OF[counter])
    if name in window.edges:
        basis = say("basis-short", edge=window.edges[name])
    return _Compared(
        guard=name,
        margin=guard.margin,
        limit=guard.margin * step.slack,
        counts={v: (seen[v][0], seen[v][1]) for v in VARIANTS},
        lower=_least(scaled, policy.alpha / policy.tests / 2.0),
        upper=lambda times: _most(scaled, policy.alpha_advance / 2.0, times),
        basis=_basis(basis, window, policy),
        needs=say("no-votes" if counter == "people" else "no-answers", who=none) if none else "",
    ).judged(explain=explain)


def effect(window: Window, policy: Policy, variant: str) -> float:
    """What a variant's counts are divided by, because requests of one user are alike.

    Kish 1965, "Survey Sampling", section 8.2: 1 + (m-1)·r, with m the mean number of requests of a
    request's user and r the correlation of two of them (``dependence``).
    """
    return max(policy.design_effect, 1.0 + policy.dependence * (window.per_user(variant) - 1.0))


def _basis(compared: str, window: Window, policy: Policy) -> str:
    """What was compared, and what a request counts for where that is less than one."""
    size = effect(window, policy, PRUNED)
    return say("sticky", basis=compared, size=size) if size > _NEARLY else compared


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
    return say("split", part=part, weight=window.weight)
