"""Counters of both variants at one moment, cumulative, and what lies between two such moments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_serve.rollout.margins import COUNTED_BY
from moe_serve.rollout.policy import Policy
from moe_serve.rollout.users import Crowd


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmReading:
    """One variant's counters at one moment. ``None``: not known."""

    requests: float | None
    """Answered or failed, counted at the proxy; with the probes where ``counts_probes``."""
    failed: float | None
    """Of these."""
    over: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Metric → (requests over the objective, requests), from the engine."""
    shares: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Guard → (answers or votes of the kind, all)."""
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
    engines: Mapping[str, float] = field(default_factory=dict)
    """Engine → when its process started, seconds since the epoch; a later one is a restart."""
    parts: frozenset[str] = frozenset()
    """Whose counters the sums above are, where that may change: engines that come bring all they
    ever counted, and those that leave take it along."""


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
    one: float = 0.0
    """Pruned requests of the last minute that failed and are a single user's."""


def usable(arm: ArmReading | None, policy: Policy) -> bool:
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


def went_back(a: ArmReading, b: ArmReading) -> bool:
    """A counter fell, or a process is another one."""
    fell = any(growth(x, y) < 0.0 for x, y in ((a.requests, b.requests), (a.failed, b.failed)))
    other = any(abs(b.engines[e] - a.engines[e]) > 1.0 for e in a.engines.keys() & b.engines.keys())
    return fell or other or _fell(a.over, b.over) or _fell(a.shares, b.shares)


def engine_fell(a: ArmReading, b: ArmReading) -> bool:
    """A counter of the engines themselves did: the proxy's and the votes may begin anew as well."""
    own = {name: pair for name, pair in b.shares.items() if COUNTED_BY[name] == "engine"}
    return _fell(a.over, b.over) or _fell(a.shares, own)


def _fell(a: Mapping[str, tuple[float, float]], b: Mapping[str, tuple[float, float]]) -> bool:
    return any(y < x for n in a.keys() & b.keys() for x, y in zip(a[n], b[n], strict=True))


def users_requests(a: ArmReading, b: ArmReading) -> float:
    """Users' requests between two readings."""
    counted = growth(a.requests, b.requests)
    if not b.counts_probes:
        return counted
    before, after = (arm.probes.get("truncated", (0.0, 0.0)) for arm in (a, b))
    return counted - (after[1] - before[1])


def of_users(
    name: str, a: tuple[float, float], b: tuple[float, float], was: ArmReading, now: ArmReading
) -> tuple[float, float]:
    """Growth of a pair of counters less what probes added to it."""
    before, after = was.probes.get(name, (0.0, 0.0)), now.probes.get(name, (0.0, 0.0))
    return b[0] - a[0] - (after[0] - before[0]), b[1] - a[1] - (after[1] - before[1])


def growth(a: float | None, b: float | None) -> float:
    """Of a counter."""
    return (b or 0.0) - (a or 0.0)
