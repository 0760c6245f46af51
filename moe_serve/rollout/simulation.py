"""A policy played against made-up traffic, through the same :func:`decide` that runs in earnest.

What a policy does to healthy and to harmful variants is a question of numbers, and the answer
belongs beside it: how often a healthy one is rolled back, how surely a harmful one is, how many
requests it saw by then, how long it all takes. Beside it a policy of fixed thresholds plays the
same traffic, as it is usual elsewhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np

from moe_serve.rollout.decision import apply, decide
from moe_serve.rollout.margins import QualityGuard, ShareGuard
from moe_serve.rollout.policy import Policy
from moe_serve.rollout.quality import Quality
from moe_serve.rollout.reading import ArmReading, Reading
from moe_serve.rollout.state import begin
from moe_serve.rollout.window import Window
from moe_serve.rollout.workload import COUNTS, START, Scenario, Traffic
from moe_serve.serving.variants import PRUNED

Fate = Literal["promoted", "rolled_back", "paused", "unfinished"]
PROBES: Final = 35
"""As many as the package's own set has."""


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


def play(policy: Policy, scenario: Scenario, seed: int) -> Outcome:
    """One rollout by policy, to its end."""
    traffic = Traffic(scenario, seed)
    # Readings are further apart here than in earnest; a warm-up is a few of them.
    policy = policy.model_copy(update={"interval_seconds": scenario.interval})
    state = begin(policy, START)
    percent, shadow = state.target(policy)
    window = Window(began=START, weight=percent, shadow=shadow)
    probed = Quality(digest="", domains={"all": PROBES})
    while traffic.elapsed < scenario.limit:
        arms = {v: _reading(policy, *seen) for v, seen in traffic.next(percent, shadow).items()}
        at = START + traffic.elapsed
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
    requests, failed, *slow, cut, none, left = (float(value) for value in counts)
    pairs = {"ttft": (slow[0], slow[1]), "tpot": (slow[2], slow[3])}
    shares = {
        "truncated": (cut, slow[1]),
        "empty": (none, slow[1]),
        "abandoned": (left, requests),
        "feedback": (0.0, 0.0),
    }
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
    before = np.zeros(COUNTS)
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
    if isinstance(policy.guards.abandoned, ShareGuard):
        margin = policy.guards.abandoned.margin
        found["requests given up, twice the margin"] = Scenario(
            rate=rate, more_abandoned=2.0 * margin
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
