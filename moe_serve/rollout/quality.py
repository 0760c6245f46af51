"""What probes have said so far of the pruned variant, and the guards that follow from it.

Quality is a property of the two models, not of a split: results are kept from step to step. The
probe set is finite and asked in random order without replacement, so the mean over it is known ever
more closely by a betting confidence sequence, and exactly once all have been asked. It is a
statement about the probe set; one like the traffic makes it one about the traffic. Further rounds
replace each result by the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from moe_serve.rollout.guards import Evidence
from moe_serve.rollout.margins import GarbageGuard, QualityGuard
from moe_serve.rollout.policy import Policy
from moe_serve.rollout.probing import Result
from moe_serve.rollout.said import say
from moe_serve.rollout.sequential import Interval, betting_interval

BOUND: Final = 2.0
"""Nats at which the divergence at one place is clipped: by then another token is the likeliest."""


@dataclass(kw_only=True, slots=True)
class Quality:
    """Results by probe, and what the set consists of."""

    digest: str
    """Of the probe set."""
    domains: Mapping[str, int]
    """Domain → probes."""
    results: dict[str, Result] = field(default_factory=dict)
    """Probe → its latest result, in the order of the first ones."""
    answered: float | None = None
    """Wall clock of the latest."""
    trouble: str = ""
    """Why the last probe gave none."""
    _cache: dict[tuple[Callable[[Result], float], float], Interval] = field(
        default_factory=dict, repr=False
    )

    @property
    def size(self) -> int:
        """Probes in the set."""
        return sum(self.domains.values())

    def add(self, identity: str, result: Result, at: float) -> None:
        """One more answer from both engines."""
        self.results[identity] = result
        self.answered, self.trouble = at, ""
        self._cache.clear()

    def mean(self, value: Callable[[Result], float]) -> float:
        """Over the results; 0 while there are none."""
        found = [value(result) for result in self.results.values()]
        return sum(found) / len(found) if found else 0.0

    def interval(
        self, value: Callable[[Result], float], alpha: float, least: float, most: float
    ) -> Interval:
        """Confidence sequence for the mean over the whole set, of values in [least, most]."""
        key = (value, alpha)
        if key not in self._cache:
            span = most - least
            unit = [(value(r) - least) / span for r in self.results.values()]
            found = betting_interval(unit, alpha, population=self.size or None)
            self._cache[key] = Interval(least + span * found.lower, least + span * found.upper)
        return self._cache[key]

    def by_domain(self) -> dict[str, tuple[int, float, float]]:
        """Domain → (probes answered, mean divergence, mean agreement of the likeliest token)."""
        found = {}
        for name in self.domains:
            results = [r for r in self.results.values() if r.domain == name]
            if number := len(results):
                kl = sum(r.kl for r in results) / number
                agreement = 1.0 - sum(r.disagreement for r in results) / number
                found[name] = (number, kl, agreement)
        return found

    def to_json(self) -> dict[str, Any]:
        """For the store: ids, domains and figures, no text."""
        return {
            "digest": self.digest,
            "domains": dict(self.domains),
            "results": {name: result.to_json() for name, result in self.results.items()},
            "answered": self.answered,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Quality:
        """Back from the store."""
        results = {name: Result.from_json(found) for name, found in value["results"].items()}
        return cls(
            digest=value["digest"],
            domains=value["domains"],
            results=results,
            answered=value["answered"],
        )


NOTHING: Final = Quality(digest="", domains={})
"""Before anything was asked."""


def _kl(result: Result) -> float:
    return result.kl


def _disagreement(result: Result) -> float:
    return result.disagreement


def _garbage(result: Result) -> float:
    original, pruned = result.flaws
    return float(bool(pruned)) - float(bool(original))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Figure:
    """What is averaged over the probes."""

    guard: str
    value: Callable[[Result], float]
    least: float
    most: float
    what: str
    """Code of what the figure is, after a number."""


_KL_FIGURE: Final = _Figure(guard="quality-kl", value=_kl, least=0.0, most=BOUND, what="nats")
_TOP1: Final = _Figure(
    guard="quality-top1", value=_disagreement, least=0.0, most=1.0, what="likeliest"
)
_GARBAGE: Final = _Figure(guard="garbage", value=_garbage, least=-1.0, most=1.0, what="broken")


def quality(
    seen: Quality | None, guard: QualityGuard, policy: Policy, now: float
) -> tuple[Evidence, ...]:
    """Mean divergence and disagreement of the likeliest token, over the set; and each domain's."""
    seen = seen or NOTHING
    return (
        _evidence(_KL_FIGURE, seen, guard.kl, policy, now),
        _evidence(_TOP1, seen, guard.top1, policy, now),
        _worst(seen, guard.kl * guard.domain, policy, now),
    )


def garbage(seen: Quality | None, guard: GarbageGuard, policy: Policy, now: float) -> Evidence:
    """Share of answers that are empty, loop, change script or are broken; paired difference."""
    return _evidence(_GARBAGE, seen or NOTHING, guard.margin, policy, now)


def _evidence(
    figure: _Figure, seen: Quality, margin: float, policy: Policy, now: float
) -> Evidence:
    def ends(alpha: float) -> Interval:
        # Each end of an interval has half of its level, and one end of each is used.
        return seen.interval(figure.value, 2.0 * alpha, figure.least, figure.most)

    lower = ends(policy.alpha / policy.tests).lower
    upper = ends(policy.alpha_advance).upper
    results = list(seen.results.values())
    number, mean = float(len(results)), seen.mean(figure.value)
    total = (0.0, mean * number)
    if figure is _GARBAGE:
        total = (
            float(sum(bool(r.flaws[0]) for r in results)),
            float(sum(bool(r.flaws[1]) for r in results)),
        )
    return _judged(
        seen,
        policy,
        now,
        Evidence(
            guard=figure.guard,
            unit="nats" if figure is _KL_FIGURE else "share",
            verdict="harm" if lower > margin else "fine" if upper <= margin else "open",
            lower=lower,
            upper=upper,
            margin=margin,
            limit=margin,
            pruned=(total[1], number),
            original=(total[0], number),
            basis=say("basis-probes", number=number, size=seen.size, unit=say(figure.what)),
            said=say("mean-probes", mean=mean, unit=say(figure.what)),
        ),
    )


def _worst(seen: Quality, limit: float, policy: Policy, now: float) -> Evidence:
    """The domain whose divergence comes to most.

    Needs no statistics: what is not asked yet adds between nothing and ``BOUND`` to a domain's sum.
    """
    sums = dict.fromkeys(seen.domains, 0.0)
    asked = dict.fromkeys(seen.domains, 0)
    for result in seen.results.values():
        sums[result.domain] += result.kl
        asked[result.domain] += 1
    least = {name: sums[name] / number for name, number in seen.domains.items()}
    most = [
        least[name] + BOUND * (number - asked[name]) / number
        for name, number in seen.domains.items()
    ]
    name = max(least, key=lambda domain: least[domain], default="")
    lower, upper = least.get(name, 0.0), max(most, default=BOUND)
    number = float(asked.get(name, 0))
    return _judged(
        seen,
        policy,
        now,
        Evidence(
            guard="quality-domain",
            unit="nats",
            verdict="harm" if lower > limit else "fine" if upper <= limit else "open",
            lower=lower,
            upper=upper,
            margin=limit,
            limit=limit,
            pruned=(sums.get(name, 0.0), number),
            original=(0.0, number),
            basis=say("basis-domain", name=name) if name else say("basis-no-domain"),
            said=say("least-domain", lower=lower, name=name)
            if name
            else say("least-no-domain", lower=lower),
        ),
    )


def _judged(seen: Quality, policy: Policy, now: float, found: Evidence) -> Evidence:
    """With what it waits for; nothing is fine on answers that have stopped coming."""
    limit = max(policy.blind_seconds, 10.0 * policy.probes.interval_seconds)
    silent = now - seen.answered if seen.answered is not None else 0.0
    if silent > limit and found.verdict == "fine":
        found = replace(found, verdict="open")
    if found.verdict != "open":
        return found
    left = seen.size - len(seen.results)
    if silent > limit:
        needs = say("probes-silent", seconds=silent)
    elif not seen.results:
        needs = say("probes-first")
    else:
        needs = say("probes-left", left=left, seconds=left * policy.probes.interval_seconds)
    needs = say("because", what=needs, trouble=seen.trouble) if seen.trouble else needs
    return replace(found, needs=needs)
