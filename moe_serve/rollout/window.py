"""What was seen under one split: differences of cumulative counters, and what was wrong.

A reading that is missing, not a number, went backwards or lies across a jump of the clock gives no
counts. Missing data is not good data: the window says since when it is blind.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from moe_serve.rollout.policy import Policy
from moe_serve.rollout.reading import (
    ArmReading,
    Reading,
    engine_fell,
    growth,
    of_users,
    usable,
    users_requests,
    went_back,
)
from moe_serve.rollout.said import say
from moe_serve.rollout.users import Crowd
from moe_serve.serving.variants import ORIGINAL, PRUNED, VARIANTS

RECENT: Final = 60.0
"""Seconds that the hard guards look back."""
_GAP: Final = 6.0
"""Intervals without a reading, after which the next one only starts afresh."""


Pair = list[float]
"""[events, trials]."""


def _pairs() -> dict[str, Pair]:
    return {variant: [0.0, 0.0] for variant in VARIANTS}


@dataclass(kw_only=True, slots=True)
class Window:
    """The evidence gathered under one split."""

    began: float
    """Wall clock."""
    age: float = 0.0
    """Seconds of the monotonic clock that were watched since then, usable or not."""
    step: tuple[float, float] = (0.0, 0.0)
    """When the step began by the record, and ``age`` at that time."""
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
    restarts: dict[str, list[float]] = field(default_factory=lambda: {v: [] for v in VARIANTS})
    """Variant → ``age`` at each restart of one of its engines, as far back as policy counts."""
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
    _known: dict[str, dict[str, tuple[float, float]]] = field(
        default_factory=lambda: {v: {} for v in VARIANTS}, repr=False
    )
    """Variant → engine → when its process started, and ``age`` when it was last seen."""

    def add(
        self, reading: Reading, policy: Policy, *, lost: str = "", began: float | None = None
    ) -> None:
        """Take one more reading in.

        Args:
            reading: what was read.
            policy: the rollout's.
            lost: why it can't be used, if that is known.
            began: when the step began, by the record; by default with the window.
        """
        before, self.last = self.last, reading
        self.now = reading.at
        self._grow_older(before, reading, began or self.step[0] or self.began)
        self.edges = dict(reading.edges) or self.edges
        # Fewer than before: the file was cut, and a new controller has read what is left.
        for name, crowd in reading.crowds.items():
            self.crowds[name] = max(self.crowds[name], crowd)
        self._follow_clock(before, reading, policy)
        self._watch(reading, policy)
        self._count_restarts(before, reading, policy)
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
        if self.age < policy.warmup_seconds + step:
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
        # What the proxy noted by the clock before is still to be found.
        self.began = min(self.began, self.began + jump)

    def _grow_older(self, before: Reading | None, now: Reading, began: float) -> None:
        if before is not None:
            self.age += max(0.0, now.tick - before.tick)
        elif not self.age:
            self.age = min(max(0.0, now.at - self.began), RECENT)
        if self.step[0] != began:
            # The step of a new window began with it, one that was gone on with only now.
            self.step = (began, self.age if self.step[0] else 0.0)

    def waited(self, began: float) -> float:
        """Seconds that the step which began then was watched, by a clock that nobody sets."""
        return self.age - self.step[1] if self.step[0] == began else 0.0

    def _count_restarts(self, before: Reading | None, now: Reading, policy: Policy) -> None:
        oldest = self.age - policy.hard.restart_seconds
        for variant in VARIANTS:
            arm, known = now.arms.get(variant), self._known[variant]
            found = [age for age in self.restarts[variant] if age > oldest]
            if arm is not None:
                again = [e for e, at in arm.engines.items() if e in known and at - known[e][0] > 1]
                was = before.arms.get(variant) if before is not None else None
                if again or (not arm.engines and was is not None and engine_fell(was, arm)):
                    found += [self.age] * max(1, len(again))
                known.update({e: (at, self.age) for e, at in arm.engines.items()})
            self.restarts[variant] = found
            self._known[variant] = {e: seen for e, seen in known.items() if seen[1] > oldest}

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
        missing = [name for name in VARIANTS if not usable(now.arms.get(name), policy)]
        if missing:
            return say("no-counters", who=missing)
        if before is None or any(not usable(before.arms.get(n), policy) for n in VARIANTS):
            return "" if before is None else say("before-unusable")
        step = now.tick - before.tick
        if step <= 0.0 or abs((now.at - before.at) - step) > policy.clock_jump_seconds:
            return say("clock")
        if step > _GAP * policy.interval_seconds:
            return say("unread", seconds=step)
        others = [n for n in VARIANTS if before.arms[n].parts != now.arms[n].parts]
        if others:
            return say("other-engines", who=others)
        back = [n for n in VARIANTS if went_back(before.arms[n], now.arms[n])]
        return say("began-anew", who=back) if back else ""

    def _recent(self, before: Reading, now: Reading) -> None:
        a, b = before.arms[PRUNED], now.arms[PRUNED]
        self.recent.append((now.tick, growth(a.failed, b.failed), users_requests(a, b)))
        while self.recent and now.tick - self.recent[0][0] > RECENT:
            self.recent.popleft()

    def _count(self, variant: str, a: ArmReading, b: ArmReading, policy: Policy) -> None:
        failed, requests = self.failures[variant], users_requests(a, b)
        failed[0] += growth(a.failed, b.failed)
        failed[1] += requests
        # The load that the requests of this interval met: the mean of its two ends.
        load = ((a.running or 0.0) + (b.running or 0.0)) / 2.0
        stratum = bisect_right(policy.strata, load)
        for metric in policy.guards.latency():
            slow, total = self.over.setdefault(metric, {}).setdefault(stratum, _pairs())[variant]
            more, all_ = of_users(metric, a.over[metric], b.over[metric], a, b)
            self.over[metric][stratum][variant] = [slow + more, total + all_]
        for name in policy.guards.shares():
            pair = self.shares.setdefault(name, _pairs())[variant]
            more, all_ = of_users(name, a.shares[name], b.shares[name], a, b)
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
        """Failed and all pruned requests of the last minute, without the user who failed most.

        A program that sends what no engine can answer, again and again, is no broken model: with
        users who stay where they are it fails on one side alone. The guards weigh it.
        """
        one = self.last.one if self.last is not None else 0.0
        failed, requests = sum(f for _, f, _ in self.recent), sum(r for _, _, r in self.recent)
        return max(0.0, failed - one), max(0.0, requests - one)

    def to_json(self) -> dict[str, Any]:
        """For the store: all but the last reading, whose clock another process does not share."""
        plain = (
            "began",
            "age",
            "step",
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
    def from_json(cls, value: Mapping[str, Any]) -> Window | None:
        """Back from the store; the next reading starts afresh.

        ``None`` where another version wrote it: what it counted is not known to mean the same.
        """
        try:
            over = {m: {int(s): p for s, p in v.items()} for m, v in value["over"].items()}
            return cls(**{**value, "over": over, "step": tuple(value["step"])})
        except (KeyError, TypeError, ValueError):
            return None
