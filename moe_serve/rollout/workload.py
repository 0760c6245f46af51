"""Made-up traffic: a daily wave, bursts, users who are alike, and what a variant does to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from moe_serve.rollout.policy import Policy
from moe_serve.rollout.probing import Result
from moe_serve.rollout.quality import BOUND, Quality
from moe_serve.rollout.users import Crowd
from moe_serve.serving.variants import ORIGINAL, PRUNED, VARIANTS

_DAY: Final = 86_400.0
START: Final = 1_800_000_000.0
"""Wall clock at the beginning."""
COUNTS: Final = 9
"""Counters of a variant, as :meth:`Traffic.next` names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """The traffic, and what the pruned variant does to it."""

    rate: float = 20.0
    """Requests per second, mean over a day."""
    diurnal: float = 0.6
    """Amplitude of the day's wave, as a share of the rate."""
    burst_share: float = 0.02
    """Share of the intervals with five times the traffic."""
    failures: float = 0.001
    """Failure rate of the original."""
    slow: float = 0.03
    """Share of the original's requests over each objective at light load."""
    load_slows: float = 0.02
    """Added to that per fourfold concurrency."""
    service_seconds: float = 2.0
    """Mean time of a request in the engine: concurrency is rate times this."""
    more_failures: float = 0.0
    """Added by the pruned variant: a regression."""
    more_slow: float = 0.0
    """Added by the pruned variant to the share over each objective."""
    truncated: float = 0.2
    """Share of the answers that end at a length limit."""
    empty: float = 0.005
    """Share of the answers of one token."""
    more_truncated: float = 0.0
    """Added by the pruned variant."""
    abandoned: float = 0.1
    """Share of the requests whose clients go away before the end."""
    more_abandoned: float = 0.0
    """Added by the pruned variant."""
    kl: float = 0.05
    """Divergence of the pruned variant on a probe, nats, mean."""
    users: int = 0
    """Who stay on one variant, some with far more requests than others (log-normal, spread 1);
    0: every request is of somebody else."""
    alike: float = 0.05
    """Correlation of failures, slowness, truncation and patience between two requests of a user."""
    onset: float = 0.0
    """Seconds after the start from which the regression is there."""
    interval: float = 60.0
    """Seconds between readings."""
    limit: float = 5.0 * _DAY
    """When the simulation gives up."""


class _People:
    """Users with their own share of the traffic, place in the split, and leanings."""

    def __init__(self, scenario: Scenario, rng: np.random.Generator) -> None:
        """Leanings are Beta: mean the scenario's rate, correlation ``alike``."""
        self._rng = rng
        number, spread = scenario.users, (1.0 - scenario.alike) / scenario.alike
        activity = rng.lognormal(0.0, 1.0, number)
        self._share, self._place = activity / activity.sum(), rng.random(number)
        names = ("failures", "slow", "truncated", "abandoned")
        rates = {name: getattr(scenario, name) for name in names}
        self._leaning = {
            name: rng.beta(rate * spread, (1.0 - rate) * spread, number) / rate
            for name, rate in rates.items()
        }
        self._weight = -1.0
        self._seen = np.zeros(number)
        self.now = {variant: np.zeros(number, dtype=np.int64) for variant in VARIANTS}

    def arrive(self, total: int, weight: float) -> None:
        """Deal out an interval's requests."""
        requests = self._rng.multinomial(total, self._share)
        pruned = self._place < weight
        self.now = {ORIGINAL: requests * ~pruned, PRUNED: requests * pruned}
        if weight != self._weight:
            self._weight = weight
            self._seen[:] = 0.0
        self._seen += requests

    def events(self, variant: str, name: str, rate: float) -> int:
        """Of the interval's requests, those that an event of this rate befell."""
        each = np.minimum(self._leaning[name] * rate, 1.0)
        return int(self._rng.binomial(self.now[variant], each).sum())

    def crowds(self) -> dict[str, Crowd]:
        """See :class:`Users`."""
        pruned = self._place < self._weight
        return {
            variant: [float(self._seen[who].sum()), float((self._seen[who] ** 2).sum())]
            for variant, who in ((ORIGINAL, ~pruned), (PRUNED, pruned))
        }


class Traffic:
    """Cumulative counters of both engines, grown interval by interval."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        """Equal seeds give equal traffic as long as the split is equal."""
        self._scenario, self._rng = scenario, np.random.default_rng(seed)
        self._phase = float(self._rng.uniform(0.0, 2.0 * math.pi))
        self._counts = {v: np.zeros(COUNTS) for v in VARIANTS}
        self._people = _People(scenario, self._rng) if scenario.users else None
        self.elapsed = 0.0
        self.exposed = self.harmed = 0.0

    def next(self, percent: float, shadow: float) -> dict[str, tuple[float, np.ndarray]]:
        """Serve one interval; variant → (concurrency, cumulative counts).

        The counts are requests, failures, (slow, all) for each of two objectives, answers that
        were truncated and empty, and requests given up.
        """
        s, rng = self._scenario, self._rng
        self.elapsed += s.interval
        wave = 1.0 + s.diurnal * math.sin(2.0 * math.pi * self.elapsed / _DAY + self._phase)
        rate = s.rate * max(wave, 0.0) * (5.0 if rng.random() < s.burst_share else 1.0)
        total = int(rng.poisson(rate * s.interval))
        if self._people is not None:
            self._people.arrive(total, percent / 100.0)
            to_pruned = int(self._people.now[PRUNED].sum())
        else:
            to_pruned = int(rng.binomial(total, percent / 100.0))
        copied = int(rng.binomial(total - to_pruned, shadow / 100.0))
        harmful = self.elapsed >= s.onset
        found = {}
        for variant, number in ((ORIGINAL, total - to_pruned), (PRUNED, to_pruned + copied)):
            worse = harmful and variant == PRUNED
            load = number / s.interval * s.service_seconds
            fails = s.failures + (s.more_failures if worse else 0.0)
            slow = s.slow + s.load_slows * math.log(max(load, 1.0), 4.0)
            slow = min(slow + (s.more_slow if worse else 0.0), 1.0)
            cuts = s.truncated + (s.more_truncated if worse else 0.0)
            gone = s.abandoned + (s.more_abandoned if worse else 0.0)
            # A copy has no client.
            asked = number - (copied if variant == PRUNED else 0)
            if self._people is not None and not copied:
                failed = self._people.events(variant, "failures", fails)
                late = np.array([self._people.events(variant, "slow", slow) for _ in range(2)])
                cut = self._people.events(variant, "truncated", cuts)
                left = self._people.events(variant, "abandoned", gone)
                done = number - failed
                late, cut = np.minimum(late, done), min(cut, done)
            else:
                failed = int(rng.binomial(number, fails))
                done = number - failed
                late = rng.binomial(done, slow, size=2)
                cut = rng.binomial(done, cuts)
                left = int(rng.binomial(asked, gone))
            none = rng.binomial(done, s.empty)
            self._counts[variant] += (number, failed, late[0], done, late[1], done, cut, none, left)
            found[variant] = (load, self._counts[variant])
        self.exposed += to_pruned
        self.harmed += to_pruned * (s.more_failures if harmful else 0.0)
        return found

    def crowds(self) -> dict[str, Crowd]:
        """As the proxy counts users under the present split."""
        return self._people.crowds() if self._people is not None else {}

    def ask(self, probed: Quality, policy: Policy) -> None:
        """Answer as many probes as fit one interval; those asked again say the same."""
        left = probed.size - len(probed.results)
        number = min(left, int(self._scenario.interval / policy.probes.interval_seconds))
        at = START + self.elapsed
        for _ in range(number):
            # Exponential: some texts lose far more than others.
            kl = min(float(self._rng.exponential(self._scenario.kl)), BOUND)
            name = str(len(probed.results))
            result = Result(domain="all", kl=kl, disagreement=min(kl, 1.0), flaws=("", ""))
            probed.add(name, result, at)
        probed.answered = at
