"""What is said while a rollout waits: what is missing, how much of it, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_serve.rollout import decision as d
from moe_serve.rollout import state as s
from moe_serve.rollout.policy import Policy, Step
from tests.rollout.test_decision import HALF, POLICY, after
from tests.support.readings import START, UNPROBED, Traffic


def test_what_is_missing_is_said() -> None:
    """400 requests each: the errors' upper end is beyond the margin, time and number follow."""
    found = after(8)
    assert (found.kind, found.reason) == ("hold", "evidence")
    assert "10 s of the minimum time" in found.words
    assert "errors: about" in found.words
    assert "more requests" in found.words
    assert "at this rate" in found.words


def test_the_estimate_of_what_is_missing_is_about_right() -> None:
    """With as many more requests as it asked for at the same rates, the guard passes."""
    found = after(20)
    (guard,) = [e for e in found.evidence if e.guard == "errors"]
    assert guard.factor is not None
    assert after(round(20 * guard.factor) + 1).evidence[0].verdict == "fine"
    assert after(round(20 * guard.factor * 0.9)).evidence[0].verdict == "open"


def test_no_traffic_is_no_evidence() -> None:
    """Flagger #361, kgateway #5036: an hour of silence neither fails nor passes."""
    found = after(300, original=(0, 0, 0), pruned=(0, 0, 0))
    assert (found.kind, found.reason) == ("hold", "no-traffic")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0.2, "1"),
        (3.2, "4"),
        (9.5, "10"),
        (10, "10"),
        (12, "12"),
        (12.1, "13"),
        (123, "130"),
        (1201, "1,300"),
        (98_765, "99,000"),
    ],
)
def test_numbers_are_rounded_upwards_to_two_digits(number: float, said: str) -> None:
    """More than is needed is no false promise."""
    assert d._rounded(number) == said


def test_what_a_guard_lacks_is_in_requests_and_time() -> None:
    """Three times 400 requests in 50 s are enough: 800 more, which take 100 s."""
    evidence = replace(after(8).evidence[0], verdict="open", factor=3.0)
    traffic = Traffic(POLICY)
    traffic.warm()
    for _ in traffic.steadily(8, (50, 0, 0), (50, 0, 0)):
        pass
    words = d._missing(traffic.window, HALF, (evidence,))
    assert words[-1] == "errors: about 800 more requests, 100 s at this rate"


def test_a_step_of_copies_lacks_copies() -> None:
    """Not users' requests, which it does not want."""
    words = {}
    for step in (Step(weight=0.0, shadow=50.0), Step(weight=50.0)):
        policy = Policy(steps=(step, Step(weight=60.0)), guards=UNPROBED)
        traffic = Traffic(policy)
        traffic.warm()
        found = d.decide(traffic.window, policy, s.begin(policy, START))
        assert found.reason == "no-traffic"
        words[step.shadow] = found.to_json()["codes"]["code"]
    assert words == {50.0: "no-copies", 0.0: "no-traffic"}


def test_only_who_asks_is_told_how_much_more() -> None:
    """The estimate takes time; a share's as well as that of errors."""
    traffic = Traffic(POLICY)
    traffic.warm()
    for _ in traffic.steadily(2, (50, 0, 0), (50, 0, 0)):
        pass
    for explain in (True, False):
        judged = d.judge(traffic.window, POLICY, HALF, None, explain=explain)
        factors = {e.guard: e.factor is not None for e in judged if e.verdict == "open"}
        assert factors["truncated"] is factors["errors"] is explain
