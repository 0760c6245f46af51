"""What was seen under one split: differences of cumulative counters, and what was wrong.

A reading that is missing, not a number, went backwards or lies across a jump of the clock gives no
counts. Missing data is not good data: the window says since when it is blind.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from moe_serve.rollout.policy import Policy
from moe_serve.rollout.said import say
from moe_serve.rollout.users import Crowd
from moe_serve.serving.variants import ORIGINAL, PRUNED, VARIANTS

_RECENT: Final = 60.0
"""Seconds that the hard guards look back."""
_GAP: Final = 6.0
"""Intervals without a reading, after which the next one only starts afresh."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmReading:
    """One variant's counters at one moment. ``None``: not known."""

    requests: float | None
    """Answered or failed, counted at the proxy, cumulative."""
    failed: float | None
    """Of these."""
    over: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Metric → (requests over the objective, requests), cumulative, from the engine."""
    shares: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Guard → (answers or votes of the kind, all), cumulative."""
    probes: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """What probes have added to the engine's counters, by metric and guard: they are no users."""
    running: float | None = None
    """Requests in the engine now; the stratum."""
    waiting: float | None = None
    """Requests that wait for room in it."""
    kv_usage: float | None = None
    """Of its KV cache, 0 to 1."""
    healthy: bool | None = None
    counts_probes: bool = False
    """Whether ``requests`` has the probes in it: where engines count, and not a proxy."""
    started: float | None = None
    """When the engine's process started, seconds since the epoch; a change is a restart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Both variants at one moment."""

    at: float
    """Wall clock, seconds since the epoch."""
    tick: float
    """Monotonic clock."""
    arms: Mapping[str, ArmReading]
    edges: Mapping[str, float] = field(default_factory=dict)
    """Metric → the histogram edge that stands for the objective, seconds."""
    crowds: Mapping[str, Crowd] = field(default_factory=dict)
    """Variant → requests of users told apart, since the window began."""


Pair = list[float]
"""[events, trials]."""


def _pairs() -> dict[str, Pair]:
    return {variant: [0.0, 0.0] for variant in VARIANTS}


@dataclass(kw_only=True, slots=True)
class Window:
    """The evidence gathered under one split."""

    began: float
    """Wall clock."""
    weight: float = 0.0
    """Percent of the traffic that pruned had in all of it."""
    shadow: float = 0.0
    """Percent that was copied to it."""
    version: str = ""
    """Of the route file that said so; evidence under one split is no evidence about another."""
    seconds: float = 0.0
    """Observed without trouble, after warm-up."""
    failures: dict[str, Pair] = field(default_factory=_pairs)
    """Variant → [failed, requests]."""
    over: dict[str, dict[int, dict[str, Pair]]] = field(default_factory=dict)
    """Metric → stratum → variant → [over the objective, requests]."""
    shares: dict[str, dict[str, Pair]] = field(default_factory=dict)
    """Guard → variant → [answers or votes of the kind, all]."""
    edges: dict[str, float] = field(default_factory=dict)
    crowds: dict[str, Crowd] = field(default_factory=_pairs)
    """Variant → [requests of users told apart, sum of these users' requests squared]."""
    restarts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(VARIANTS, 0))
    trouble: str = ""
    """Why the last reading could not be used."""
    blind_since: float | None = None
    """Wall clock of the first of the unusable readings in a row."""
    unhealthy_since: float | None = None
    """Of the pruned engine."""
    original_down: bool = False
    """The original's health check fails: there is nothing to roll back to."""
    full_since: float | None = None
    """Of the pruned engine's KV cache, with requests waiting."""
    recent: deque[tuple[float, float, float]] = field(default_factory=deque)
    """(tick, failed, requests) of pruned over the last minute, warm-up included."""
    now: float = 0.0
    """Wall clock of the last reading."""
    last: Reading | None = None

    def add(self, reading: Reading, policy: Policy, *, lost: str = "") -> None:
        """Take one more reading in; ``lost`` says why it can't be used, if that is known."""
        before, self.last = self.last, reading
        self.now = reading.at
        self.edges = dict(reading.edges) or self.edges
        # Fewer than before: the file was cut, and a new controller has read what is left.
        for name, crowd in reading.crowds.items():
            self.crowds[name] = max(self.crowds[name], crowd)
        self._follow_clock(before, reading, policy)
        self._watch(reading, policy)
        self.trouble = lost or self._trouble(before, reading, policy)
        if self.trouble:
            if self.blind_since is None:
                self.blind_since = reading.at
            return
        self.blind_since = None
        if before is None:
            return
        step = reading.tick - before.tick
        self._recent(before, reading)
        if reading.at - self.began < policy.warmup_seconds + step:
            return
        self.seconds += step
        for variant in VARIANTS:
            self._count(variant, before.arms[variant], reading.arms[variant], policy)

    def _follow_clock(self, before: Reading | None, now: Reading, policy: Policy) -> None:
        """Where the clock was set, what lasts since a moment lasts no longer by it, and no less."""
        if before is None:
            return
        jump = (now.at - before.at) - (now.tick - before.tick)
        if abs(jump) <= policy.clock_jump_seconds:
            return
        for name in ("blind_since", "unhealthy_since", "full_since"):
            moment = getattr(self, name)
            if moment is not None:
                setattr(self, name, moment + jump)

    def _watch(self, reading: Reading, policy: Policy) -> None:
        """What the hard guards need, also from readings that give no counts."""
        pruned, original = reading.arms.get(PRUNED), reading.arms.get(ORIGINAL)
        if original is not None and original.healthy is not None:
            if self.original_down and original.healthy:
                # Nothing could be done about it meanwhile; being blind counts from here.
                self.blind_since = None
            self.original_down = not original.healthy
        if pruned is None:
            return
        if pruned.healthy is not None:
            self.unhealthy_since = (
                None if pruned.healthy else self._since(self.unhealthy_since, reading)
            )
        if pruned.kv_usage is not None:
            full = pruned.kv_usage >= policy.hard.kv_usage and (pruned.waiting or 0.0) > 0.0
            self.full_since = self._since(self.full_since, reading) if full else None

    @staticmethod
    def _since(moment: float | None, reading: Reading) -> float:
        return reading.at if moment is None else moment

    def _trouble(self, before: Reading | None, now: Reading, policy: Policy) -> str:
        missing = [name for name in VARIANTS if not _usable(now.arms.get(name), policy)]
        if missing:
            return say("no-counters", who=missing)
        if before is None or any(not _usable(before.arms.get(n), policy) for n in VARIANTS):
            return "" if before is None else say("before-unusable")
        step = now.tick - before.tick
        if step <= 0.0 or abs((now.at - before.at) - step) > policy.clock_jump_seconds:
            return say("clock")
        if step > _GAP * policy.interval_seconds:
            return say("unread", seconds=step)
        back = [n for n in VARIANTS if _went_back(before.arms[n], now.arms[n])]
        for name in back:
            self.restarts[name] += 1
        return say("began-anew", who=back) if back else ""

    def _recent(self, before: Reading, now: Reading) -> None:
        a, b = before.arms[PRUNED], now.arms[PRUNED]
        self.recent.append((now.tick, _delta(a.failed, b.failed), _delta(a.requests, b.requests)))
        while self.recent and now.tick - self.recent[0][0] > _RECENT:
            self.recent.popleft()

    def _count(self, variant: str, a: ArmReading, b: ArmReading, policy: Policy) -> None:
        failed, requests = self.failures[variant], _delta(a.requests, b.requests)
        failed[0] += _delta(a.failed, b.failed)
        failed[1] += requests
        # The load that the requests of this interval met: the mean of its two ends.
        load = ((a.running or 0.0) + (b.running or 0.0)) / 2.0
        stratum = bisect_right(policy.strata, load)
        for metric in policy.guards.latency():
            slow, total = self.over.setdefault(metric, {}).setdefault(stratum, _pairs())[variant]
            more, all_ = _of_users(metric, a.over[metric], b.over[metric], a, b)
            self.over[metric][stratum][variant] = [slow + more, total + all_]
        for name in policy.guards.shares():
            pair = self.shares.setdefault(name, _pairs())[variant]
            more, all_ = _of_users(name, a.shares[name], b.shares[name], a, b)
            pair[0] += more
            pair[1] += all_

    @property
    def requests(self) -> float:
        """Pruned requests counted."""
        return self.failures[PRUNED][1]

    def per_user(self, *variants: str) -> float:
        """Requests of one user, as a request meets it: Σn² / Σn, those of nobody known alone.

        It is what all counts are divided by where a user's requests are all alike.
        """
        # Copies are of the same users.
        names = [ORIGINAL] if self.shadow else variants
        known = sum(self.crowds[name][0] for name in names)
        more = sum(self.crowds[name][1] for name in names) - known
        number = max(known, sum(self.failures[name][1] for name in names))
        return 1.0 + more / number if number > 0.0 else 1.0

    def burst(self) -> tuple[float, float]:
        """Failed and all pruned requests of the last minute."""
        return sum(f for _, f, _ in self.recent), sum(r for _, _, r in self.recent)

    def to_json(self) -> dict[str, Any]:
        """For the store: all but the last reading, whose clock another process does not share."""
        plain = (
            "began",
            "weight",
            "shadow",
            "version",
            "seconds",
            "failures",
            "shares",
            "edges",
            "crowds",
            "restarts",
            "now",
            "trouble",
        )
        since = ("blind_since", "unhealthy_since", "full_since")
        return {
            **{name: getattr(self, name) for name in (*plain, *since)},
            "over": {m: {str(s): p for s, p in strata.items()} for m, strata in self.over.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Window:
        """Back from the store; the next reading starts afresh."""
        over = {m: {int(s): p for s, p in v.items()} for m, v in value["over"].items()}
        return cls(**{**value, "over": over})


def _usable(arm: ArmReading | None, policy: Policy) -> bool:
    """Whether the counters are there and are numbers."""
    if arm is None or arm.requests is None or arm.failed is None:
        return False
    values = [arm.requests, arm.failed]
    for metric in policy.guards.latency():
        if metric not in arm.over:
            return False
        values += arm.over[metric]
    for name in policy.guards.shares():
        if name not in arm.shares:
            return False
        values += arm.shares[name]
    return all(math.isfinite(value) for value in values)


def _went_back(a: ArmReading, b: ArmReading) -> bool:
    """A counter fell, or the process is another one."""
    pairs = [(a.requests, b.requests), (a.failed, b.failed)]
    for metric in a.over.keys() & b.over.keys():
        pairs += zip(a.over[metric], b.over[metric], strict=True)
    for name in a.shares.keys() & b.shares.keys():
        pairs += zip(a.shares[name], b.shares[name], strict=True)
    fell = any((y or 0.0) < (x or 0.0) for x, y in pairs)
    other = a.started is not None and b.started is not None and b.started - a.started > 1.0
    return fell or other


def _of_users(
    name: str, a: tuple[float, float], b: tuple[float, float], was: ArmReading, now: ArmReading
) -> tuple[float, float]:
    """Growth of a pair of counters less what probes added to it."""
    before, after = was.probes.get(name, (0.0, 0.0)), now.probes.get(name, (0.0, 0.0))
    return b[0] - a[0] - (after[0] - before[0]), b[1] - a[1] - (after[1] - before[1])


def _delta(a: float | None, b: float | None) -> float:
    return (b or 0.0) - (a or 0.0)
