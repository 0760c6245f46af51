"""The guards on probes, and the votes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from moe_serve.rollout import decision as d
from moe_serve.rollout import sequential as sq
from moe_serve.rollout.feedback import Votes
from moe_serve.rollout.guards import Evidence
from moe_serve.rollout.margins import Guards, ShareGuard
from moe_serve.rollout.policy import Policy, Step
from moe_serve.rollout.probing import Result
from moe_serve.rollout.quality import Quality
from moe_serve.rollout.state import begin
from moe_serve.serving.garbage import Flaw
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.readings import START, Traffic

POLICY = Policy(steps=(Step(weight=0.0, min_seconds=0.0), Step(weight=50.0)))
DOMAINS = {"code": 10, "japanese": 10, "prose": 10}


def probed(
    number: int = 30, *, kl: float = 0.05, differ: float = 0.1, worst: float = 0.0, flaw: Flaw = ""
) -> Quality:
    """The first ``number`` of thirty; ``worst`` is added in Japanese."""
    found = Quality(digest="d", domains=DOMAINS)
    for index in range(number):
        domain = list(DOMAINS)[index % 3]
        more = worst if domain == "japanese" else 0.0
        result = Result(domain=domain, kl=kl + more, disagreement=differ, flaws=("", flaw))
        found.add(str(index), result, START)
    return found


def decided(quality: Quality | None, seconds: float = 60.0) -> d.Decision:
    """In the step that asks probes alone."""
    traffic = Traffic(POLICY)
    for _ in range(int(seconds / 5.0)):
        traffic.read()
    return d.decide(traffic.window, POLICY, begin(POLICY, START), probed=quality)


def guard(found: d.Decision, name: str) -> Evidence:
    """One guard's evidence."""
    return next(e for e in found.evidence if e.guard == name)


def test_without_replacement_the_end_is_exact() -> None:
    """All of the set: no interval is left. One short of it: what the last one can add, by hand."""
    x = [0.1, 0.3, 0.2, 0.4]
    assert sq.betting_interval(x, 0.05, population=4) == sq.Interval(0.25, 0.25)
    found = sq.betting_interval(x[:3], 0.05, population=4)
    assert found.lower == pytest.approx(0.6 / 4)
    assert found.upper == pytest.approx((0.6 + 1.0) / 4)


@pytest.mark.parametrize("population", [40, 200])
def test_without_replacement_it_errs_as_rarely_as_it_says(population: int) -> None:
    """300 random orders of a skewed set, looked at after each draw: at 10 %, 30 of them at most.

    Three standard deviations of the simulation are allowed on top.
    """
    rng, wrong = np.random.default_rng(1), 0
    values = rng.beta(0.3, 2.0, population)
    mean = float(values.mean())
    for _ in range(300):
        x = rng.permutation(values)[:-1]
        wrong += bool(sq.log_capital(x, mean, 0.1, population).max() >= np.log(10.0))
    assert wrong <= 30 + 3 * (300 * 0.1 * 0.9) ** 0.5


def test_knowing_the_sets_size_helps() -> None:
    """30 of 40 drawn: narrower than 30 of any number."""
    x = np.random.default_rng(2).beta(0.5, 4.0, 30)
    free, bound = sq.betting_interval(x, 0.05), sq.betting_interval(x, 0.05, population=40)
    assert bound.upper - bound.lower < free.upper - free.lower


def test_good_probes_let_the_first_step_go_without_traffic() -> None:
    """No user has seen anything, and the three guards say fine."""
    found = decided(probed())
    assert (found.kind, found.reason) == ("advance", "fine")
    assert [e.guard for e in found.evidence] == [
        "quality-kl",
        "quality-top1",
        "quality-domain",
        "garbage",
    ]
    assert guard(found, "quality-kl").lower == pytest.approx(0.05)


def test_what_is_waited_for_is_said() -> None:
    """Nothing, a few, none any more."""
    assert "quality-kl: a first probe that is answered" in decided(None).words
    few = probed(6)
    few.trouble = "pruned engine: no answer"
    assert "at most 24 more probes, 240 s at their rate (pruned engine: no" in decided(few).words
    old = decided(probed(), seconds=1000.0)
    assert (old.kind, guard(old, "quality-kl").verdict) == ("hold", "open")
    assert "none was for" in old.words


@pytest.mark.parametrize(
    ("quality", "names"),
    [
        (probed(8, kl=1.2, differ=0.95), {"quality-kl", "quality-top1"}),
        (probed(kl=0.3), {"quality-kl"}),
        (probed(differ=0.31), {"quality-top1"}),
        (probed(kl=0.01, worst=0.75), {"quality-kl", "quality-domain"}),
        (probed(kl=0.0, worst=0.74), set()),
        (probed(flaw="loop"), {"garbage"}),
    ],
)
def test_harm_is_named(quality: Quality, names: set[str]) -> None:
    """0.01 + a third of 0.75 is 0.26, above 0.25; in Japanese 0.76, above 3 × 0.25."""
    found = decided(quality)
    assert found.kind == ("rollback" if names else "advance")
    assert {e.guard for e in found.evidence if e.verdict == "harm"} == names
    assert all(name in found.words for name in names)


def test_a_lost_domain_is_seen_before_all_is_asked() -> None:
    """Five of ten Japanese at 2 nats: at least 1 in the mean, whatever the others say."""
    some = probed(15, kl=0.0, worst=2.0)
    assert guard(decided(some), "quality-domain").verdict == "harm"


def test_it_survives_the_store_and_holds_no_text() -> None:
    """Ids, domains, figures."""
    found = probed(7, flaw="loop")
    again = Quality.from_json(json.loads(json.dumps(found.to_json())))
    assert again.to_json() == found.to_json()
    number, kl, agreement = again.by_domain()["code"]
    assert (number, kl, agreement) == pytest.approx((3, 0.05, 0.9))


def shares(guards: Guards) -> Iterator[tuple[Traffic, Policy]]:
    """A policy of one step at half of the traffic, warm."""
    policy = Policy(steps=(Step(weight=50.0, min_seconds=0.0),), guards=guards)
    traffic = Traffic(policy)
    traffic.warm()
    yield traffic, policy


@pytest.mark.parametrize("name", ["truncated", "abandoned"])
def test_more_of_a_kind_roll_back_and_probes_are_taken_off(name: str) -> None:
    """A fifth more of the answers are cut, or given up; the same by probes alone is no evidence."""
    for mine in (True, False):
        guards = Guards(quality="off", garbage="off", abandoned=ShareGuard(margin=0.05))
        (traffic, policy), *_ = shares(guards)
        for tick in range(40):
            for variant in (ORIGINAL, PRUNED):
                cut = 10.0 if variant == PRUNED else 0.0
                traffic.serve(variant, 50, **{name: cut})
            if mine:
                arm = traffic.arms[PRUNED]
                probes = {name: (10.0 * (tick + 1), 10.0 * (tick + 1))}
                traffic.arms[PRUNED] = replace(arm, probes=probes)
            traffic.read()
        found = d.decide(traffic.window, policy, begin(policy, START))
        assert (found.kind == "rollback") is not mine
        assert found.words.startswith(f"{name}: 400 of 2000 on pruned") is not mine


def test_feedback_is_off_and_waits_for_votes_when_it_is_on() -> None:
    """Then a variant that is voted down goes back."""
    assert "feedback" not in Guards().shares()
    guards = Guards(quality="off", garbage="off", truncated="off", feedback=ShareGuard(margin=0.1))
    (traffic, policy), *_ = shares(guards)
    silent = replace(traffic.arms[PRUNED], shares={"empty": (0, 0), "feedback": (0, 0)})
    traffic.arms = {ORIGINAL: silent, PRUNED: silent}
    state = begin(policy, START)
    traffic.read()
    (*_, votes) = d.decide(traffic.window, policy, state).evidence
    assert votes.needs == "votes of original and pruned: none yet"
    for variant, bad in ((ORIGINAL, 5), (PRUNED, 60)):
        voted = {"empty": (0.0, 0.0), "feedback": (float(bad), 100.0)}
        traffic.arms[variant] = replace(silent, shares=voted)
    found = d.decide(traffic.read(), policy, state)
    assert (found.kind, "feedback: 60 of 100 on pruned" in found.words) == ("rollback", True)


def test_votes_are_counted_at_a_bounded_rate() -> None:
    """200 at once, 50 a second; a flood is refused, not queued."""
    now = 0.0
    votes = Votes(clock=lambda: now)
    assert sum(votes.add(PRUNED, good=False) for _ in range(300)) == 200
    now = 1.0
    assert sum(votes.add(ORIGINAL, good=True) for _ in range(300)) == 50
    assert (votes.counted(PRUNED), votes.counted(ORIGINAL)) == ((200, 200), (0, 50))
