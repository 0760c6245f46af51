"""A policy played against made-up traffic, through the same :func:`decide` that runs in earnest.

What a policy does to healthy and to harmful variants is a question of numbers, and the answer
belongs beside it: how often a healthy one is rolled back, how surely a harmful one is, how many
requests it saw by then, how long it all takes. Beside it a policy of fixed thresholds plays the
same traffic, as it is usual elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np

from moe_serve.rollout.decision import apply, decide
from moe_serve.rollout.margins import QualityGuard, ShareGuard
from moe_serve.rollout.policy import Policy
from moe_serve.rollout.probing import Result
from moe_serve.rollout.quality import BOUND, Quality
from moe_serve.rollout.reading import ArmReading, Reading
from moe_serve.rollout.state import begin
from moe_serve.rollout.users import Crowd
from moe_serve.rollout.window import Window
from moe_serve.serving.variants import ORIGINAL, PRUNED, VARIANTS

Fate = Literal["promoted", "rolled_back", "paused", "unfinished"]
_DAY: Final = 86_400.0
_START: Final = 1_800_000_000.0
PROBES: Final = 35
"""As many as the package's own set has."""


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
    kl: float = 0.05
    """Divergence of the pruned variant on a probe, nats, mean."""
    users: int = 0
    """Who stay on one variant, some with far more requests than others (log-normal, spread 1);
    0: every request is of somebody else."""
    alike: float = 0.05
    """Correlation of failures, slowness and truncation between two requests of one user."""
    onset: float = 0.0
    """Seconds after the start from which the regression is there."""
    interval: float = 60.0
    """Seconds between readings."""
    limit: float = 5.0 * _DAY
    """When the simulation gives up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How one rollout ended."""

    fate: Fate
    reason: str
    seconds: float
    exposed: float
    """Requests that pruned answered."""
    harmed: float
    """Of these, expected failures that the original would not have had."""


class _People:
    """Users with their own share of the traffic, place in the split, and leanings."""

    def __init__(self, scenario: Scenario, rng: np.random.Generator) -> None:
        """Leanings are Beta: mean the scenario's rate, correlation ``alike``."""
        self._rng = rng
        number, spread = scenario.users, (1.0 - scenario.alike) / scenario.alike
        activity = rng.lognormal(0.0, 1.0, number)
        self._share, self._place = activity / activity.sum(), rng.random(number)
        rates = {name: getattr(scenario, name) for name in ("failures", "slow", "truncated")}
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
        self._counts = {v: np.zeros(8) for v in VARIANTS}
        self._people = _People(scenario, self._rng) if scenario.users else None
        self.elapsed = 0.0
        self.exposed = self.harmed = 0.0

    def next(self, percent: float, shadow: float) -> dict[str, tuple[float, np.ndarray]]:
        """Serve one interval; variant → (concurrency, cumulative counts).

        The counts are requests, failures, (slow, all) for each of two objectives, and answers
        that were truncated and empty.
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
            if self._people is not None and not copied:
                failed = self._people.events(variant, "failures", fails)
                late = np.array([self._people.events(variant, "slow", slow) for _ in range(2)])
                cut = self._people.events(variant, "truncated", cuts)
                done = number - failed
                late, cut = np.minimum(late, done), min(cut, done)
            else:
                failed = int(rng.binomial(number, fails))
                done = number - failed
                late = rng.binomial(done, slow, size=2)
                cut = rng.binomial(done, cuts)
            none = rng.binomial(done, s.empty)
            self._counts[variant] += (number, failed, late[0], done, late[1], done, cut, none)
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
        at = _START + self.elapsed
        for _ in range(number):
            # Exponential: some texts lose far more than others.
            kl = min(float(self._rng.exponential(self._scenario.kl)), BOUND)
            name = str(len(probed.results))
            result = Result(domain="all", kl=kl, disagreement=min(kl, 1.0), flaws=("", ""))
            probed.add(name, result, at)
        probed.answered = at


def play(policy: Policy, scenario: Scenario, seed: int) -> Outcome:
    """One rollout by policy, to its end."""
    traffic = Traffic(scenario, seed)
    # Readings are further apart here than in earnest; a warm-up is a few of them.
    policy = policy.model_copy(update={"interval_seconds": scenario.interval})
    state = begin(policy, _START)
    percent, shadow = state.target(policy)
    window = Window(began=_START, weight=percent, shadow=shadow)
    probed = Quality(digest="", domains={"all": PROBES})
    while traffic.elapsed < scenario.limit:
        arms = {v: _reading(policy, *seen) for v, seen in traffic.next(percent, shadow).items()}
        at = _START + traffic.elapsed
        reading = Reading(at=at, tick=traffic.elapsed, arms=arms, crowds=traffic.crowds())
        window.add(reading, policy, began=state.began)
        traffic.ask(probed, policy)
        found = decide(window, policy, state, probed=probed, explain=False)
        if found.kind == "hold":
            continue
        state = apply(found, state, policy, at)
        if state.phase in ("promoted", "rolled_back", "paused"):
            fates: dict[str, Fate] = {"promoted": "promoted", "rolled_back": "rolled_back"}
            fate = fates.get(state.phase, "paused")
            return _outcome(fate, found.reason, traffic)
        percent, shadow = state.target(policy)
        window = Window(began=at, weight=percent, shadow=shadow, last=window.last)
    return _outcome("unfinished", "", traffic)


def _reading(policy: Policy, load: float, counts: np.ndarray) -> ArmReading:
    requests, failed, *slow, cut, none = (float(value) for value in counts)
    pairs = {"ttft": (slow[0], slow[1]), "tpot": (slow[2], slow[3])}
    shares = {"truncated": (cut, slow[1]), "empty": (none, slow[1]), "feedback": (0.0, 0.0)}
    return ArmReading(
        requests=requests,
        failed=failed,
        over={metric: pairs[metric] for metric in policy.guards.latency()},
        shares=shares,
        running=load,
        waiting=0.0,
        healthy=True,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """A policy of the usual kind: look every so often, compare with a number, count failures.

    Defaults as in Flagger's documentation (success at least 99 %, checked each minute, ten failed
    checks end it, ten points more each step up to fifty) with its check of a latency made one of
    the share over the objective.
    """

    failed: float = 0.01
    slow: float = 0.1
    interval: float = 60.0
    step: float = 10.0
    top: float = 50.0
    tolerated: int = 10


def play_thresholds(rules: Thresholds, scenario: Scenario, seed: int) -> Outcome:
    """One rollout by fixed thresholds on each interval's own counts; no traffic fails a check."""
    traffic = Traffic(scenario, seed)
    percent, failures = rules.step, 0
    before = np.zeros(8)
    while traffic.elapsed < scenario.limit:
        counts = traffic.next(percent, 0.0)[PRUNED][1].copy()
        requests, failed, slow_a, done, slow_b, *_ = counts - before
        before = counts
        good = (
            requests > 0
            and failed <= rules.failed * requests
            and max(slow_a, slow_b) <= rules.slow * done
        )
        failures += not good
        if failures >= rules.tolerated:
            return _outcome("rolled_back", "threshold", traffic)
        if not good:
            continue
        percent += rules.step
        if percent > rules.top:
            return _outcome("promoted", "", traffic)
    return _outcome("unfinished", "", traffic)


def _outcome(fate: Fate, reason: str, traffic: Traffic) -> Outcome:
    return Outcome(
        fate=fate,
        reason=reason,
        seconds=traffic.elapsed,
        exposed=traffic.exposed,
        harmed=traffic.harmed,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Many rollouts of one scenario under one policy."""

    scenario: str
    policy: str
    rollouts: int
    promoted: float
    rolled_back: float
    paused: float
    unfinished: float
    hours: float
    """Median to the end."""
    exposed: float
    """Median of the requests that pruned answered."""
    harmed: float
    """Mean of the failures that pruned added."""

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def summarise(scenario: str, policy: str, outcomes: list[Outcome]) -> Summary:
    """Shares and medians."""
    number = len(outcomes)

    def share(fate: Fate) -> float:
        return sum(o.fate == fate for o in outcomes) / number

    return Summary(
        scenario=scenario,
        policy=policy,
        rollouts=number,
        promoted=share("promoted"),
        rolled_back=share("rolled_back"),
        paused=share("paused"),
        unfinished=share("unfinished"),
        hours=float(np.median([o.seconds for o in outcomes])) / 3600.0,
        exposed=float(np.median([o.exposed for o in outcomes])),
        harmed=float(np.mean([o.harmed for o in outcomes])),
    )


def scenarios(policy: Policy, rate: float = 20.0) -> dict[str, Scenario]:
    """Healthy traffic of three sizes, and regressions of twice each guard's margin."""
    errors = policy.guards.errors.margin
    found = {
        "healthy": Scenario(rate=rate),
        "healthy, a twentieth of the traffic": Scenario(rate=rate / 20.0),
        "healthy, the original fails in 1 %": Scenario(rate=rate, failures=0.01),
        "failures of twice the margin": Scenario(rate=rate, more_failures=2.0 * errors),
        "failures of twice the margin after an hour": Scenario(
            rate=rate, more_failures=2.0 * errors, onset=3600.0
        ),
    }
    if slow := policy.guards.latency():
        margin = max(guard.margin for guard in slow.values())
        found["slowness of twice the margin"] = Scenario(rate=rate, more_slow=2.0 * margin)
    if isinstance(policy.guards.truncated, ShareGuard):
        margin = policy.guards.truncated.margin
        found["truncated answers, twice the margin"] = Scenario(
            rate=rate, more_truncated=2.0 * margin
        )
    if isinstance(policy.guards.quality, QualityGuard):
        found["divergence of twice the margin"] = Scenario(
            rate=rate, kl=2.0 * policy.guards.quality.kl
        )
    return found


def simulate(
    policy: Policy, scenario: Scenario, rollouts: int, seed: int = 0
) -> tuple[list[Outcome], list[Outcome]]:
    """The same traffic under the policy and under fixed thresholds."""
    seeds = range(seed, seed + rollouts)
    return (
        [play(policy, scenario, number) for number in seeds],
        [play_thresholds(Thresholds(), scenario, number) for number in seeds],
    )
