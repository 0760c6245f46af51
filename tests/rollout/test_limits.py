"""What is decided without statistics: data that cannot be used, clocks, hard limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from moe_serve.rollout import decision as d
from moe_serve.rollout import state as s
from moe_serve.rollout.margins import Hard
from moe_serve.rollout.policy import Policy, Step
from moe_serve.rollout.reading import ArmReading, Reading
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.readings import EMPTY, START, UNPROBED, Traffic

HALF = Step(weight=50.0, min_seconds=60.0, min_requests=100, max_seconds=3600.0)
POLICY = Policy(steps=(HALF,), guards=UNPROBED)
CANARY = s.begin(POLICY, START)


def broken(**changes: object) -> Callable[[ArmReading], ArmReading]:
    """An arm with fields replaced."""
    return lambda arm: replace(arm, **changes)  # type: ignore[arg-type]  # fields by name


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        (PRUNED, broken(requests=None)),
        (PRUNED, broken(failed=float("nan"))),
        (ORIGINAL, broken(over={})),
        (ORIGINAL, broken(over={"ttft": (float("nan"), 1), "tpot": (0, 0)})),
        (PRUNED, broken(requests=float("inf"))),
        (PRUNED, broken(shares={})),
        (ORIGINAL, broken(shares={"truncated": (0, 0), "empty": (float("nan"), 1)})),
    ],
)
def test_unusable_data_holds_then_rolls_back(
    variant: str, change: Callable[[ArmReading], ArmReading]
) -> None:
    """Kayenta #377: NaN is not zero. Perfect counts before do not help; never advances."""
    traffic = Traffic(POLICY)
    traffic.warm()
    for _ in traffic.steadily(60, (50, 0, 0), (50, 0, 0)):
        pass
    kinds = []
    for _ in range(70):
        traffic.read(changed={variant: change(traffic.arms[variant])})
        kinds.append(d.decide(traffic.window, POLICY, CANARY))
    assert {k.kind for k in kinds[:60]} == {"hold"}
    assert {k.reason for k in kinds} == {"blind"}
    assert kinds[0].words.endswith("; rolled back when that lasts 5 minutes")
    # 300 s after the first unusable reading.
    assert [k.kind for k in kinds].index("rollback") == 60


@pytest.mark.parametrize("jump", [900.0, -900.0])
def test_a_clock_that_is_set_makes_nothing_last_longer(jump: float) -> None:
    """A scrape failed and a health check too, then the clock jumps: still only seconds ago.

    Nor shorter: what goes on failing is rolled back after 15 s of the clock that does not jump.
    """
    traffic = Traffic(POLICY)
    traffic.warm()
    traffic.read(changed={PRUNED: replace(traffic.arms[PRUNED], requests=None)})
    ill = {PRUNED: replace(traffic.arms[PRUNED], healthy=False)}
    traffic.read(changed=ill)
    traffic.at += jump
    for kind in ("hold", "hold", "rollback"):
        found = d.decide(traffic.read(changed=ill), POLICY, CANARY)
        assert found.kind == kind, found.words
    assert found.reason == "hard"


@pytest.mark.parametrize("jump", [86_400.0, -86_400.0])
def test_a_clock_that_is_set_ends_no_step(jump: float) -> None:
    """A day forth or back: the verdict is due after an hour of the clock that does not jump."""
    traffic = Traffic(POLICY)
    traffic.warm()
    traffic.at += jump
    reasons = [
        d.decide(window, POLICY, CANARY, explain=False).reason
        for window in traffic.steadily(720, (1, 0, 0), (0.1, 0, 0))
    ]
    # 3,600 s in steps of 5 s, of which warming up took the first 40 s.
    assert reasons.index("inconclusive") == 720 - 40 // 5 - 1


def test_gauges_that_are_no_numbers_are_no_limit_reached() -> None:
    """A KV cache of NaN is not full; the requests are counted, in a stratum like any other."""
    odd = broken(**dict.fromkeys(("running", "waiting", "kv_usage"), float("nan")))
    traffic = Traffic(POLICY)
    traffic.warm()
    before = traffic.window.requests
    for _ in range(80):
        for variant in (ORIGINAL, PRUNED):
            traffic.serve(variant, 10)
        changed = {v: odd(traffic.arms[v]) for v in (ORIGINAL, PRUNED)}
        found = d.decide(traffic.read(changed=changed), POLICY, CANARY)
        assert found.kind != "rollback", found.words
    assert traffic.window.requests == before + 800


def test_blindness_that_ends_is_forgiven() -> None:
    """Argo #1905: a metric without a value pauses, and resumes by itself."""
    traffic = Traffic(POLICY)
    traffic.warm()
    for _ in traffic.steadily(60, (50, 0, 0), (50, 0, 0)):
        pass
    for _ in range(20):
        traffic.read(changed={PRUNED: replace(traffic.arms[PRUNED], requests=None)})
    traffic.read()
    assert d.decide(traffic.read(), POLICY, CANARY).kind == "advance"


def test_a_failure_burst_is_acted_on_at_once() -> None:
    """Twenty of twenty failed within the warm-up: the next reading rolls back."""
    traffic = Traffic(POLICY)
    traffic.read()
    traffic.serve(PRUNED, 20, failed=20)
    found = d.decide(traffic.read(), POLICY, CANARY)
    assert (found.kind, found.reason) == ("rollback", "hard")


def test_a_burst_of_one_user_is_no_burst() -> None:
    """Sixty of sixty-five fail within a minute, sixty are one program's; twenty others' are one."""
    for others, kind in ((5, "hold"), (20, "rollback")):
        traffic = Traffic(POLICY)
        traffic.read()
        traffic.serve(PRUNED, 65 + others, failed=60 + others)
        traffic.at, traffic.tick = traffic.at + 5.0, traffic.tick + 5.0
        reading = Reading(at=traffic.at, tick=traffic.tick, arms=traffic.arms, one=60.0)
        traffic.window.add(reading, POLICY)
        assert d.decide(traffic.window, POLICY, CANARY).kind == kind


def test_an_unhealthy_engine_is_a_hard_limit_even_when_it_is_not_counted() -> None:
    """Its counters are gone, its health check fails: 15 s, not 300."""
    traffic = Traffic(POLICY)
    traffic.warm()
    gone = ArmReading(requests=None, failed=None, healthy=False)
    kinds = [d.decide(traffic.read(changed={PRUNED: gone}), POLICY, CANARY).kind for _ in range(4)]
    assert kinds == ["hold", "hold", "hold", "rollback"]


def test_nothing_is_rolled_back_onto_a_dead_original() -> None:
    """Its counters are gone for longer than the limit, and pruned fails too: a person is needed."""
    traffic = Traffic(POLICY)
    traffic.warm()
    gone = ArmReading(requests=None, failed=None, healthy=False)
    for _ in range(100):
        traffic.serve(PRUNED, 50, failed=50)
        traffic.read(changed={ORIGINAL: gone})
        held = d.decide(traffic.window, POLICY, CANARY)
        assert (held.kind, held.reason) == ("hold", "original-down")
        assert held.words.startswith("the original is down; rolling back would send")
    traffic.serve(PRUNED, 50, failed=50)
    assert d.decide(traffic.read(), POLICY, CANARY).kind == "hold"
    traffic.serve(PRUNED, 50, failed=50)
    assert d.decide(traffic.read(), POLICY, CANARY).kind == "rollback"


def test_restarts_hold_and_a_crash_loop_rolls_back() -> None:
    """Counters that begin anew give no counts; the third time it is a crash loop."""
    policy = POLICY.model_copy(update={"hard": Hard(restarts=2)})
    traffic = Traffic(policy)
    traffic.warm()
    seen = []
    for _ in range(2):
        traffic.serve(PRUNED, 50)
        traffic.read()
        traffic.arms[PRUNED] = EMPTY
        seen.append(d.decide(traffic.read(), policy, CANARY).kind)
    assert seen == ["hold", "rollback"]


def test_restarts_of_long_ago_are_no_crash_loop() -> None:
    """Promoted, and a restart every second day: the third comes on the fifth day."""
    traffic = Traffic(POLICY)
    promoted = s.enter(CANARY, POLICY, 1, START)
    for days in range(3):
        traffic.arms[PRUNED] = replace(traffic.arms[PRUNED], engines={"": START + days})
        found = d.decide(traffic.read(), POLICY, promoted)
        assert (found.kind, len(traffic.window.restarts[PRUNED])) == ("hold", 0)
        traffic.read(2 * 86_400.0)
        traffic.arms[PRUNED] = replace(traffic.arms[PRUNED], engines={"": START + days + 0.9})


def test_a_full_cache_that_stays_full() -> None:
    """With requests waiting, for five minutes."""
    traffic = Traffic(POLICY)
    traffic.arms[PRUNED] = replace(traffic.arms[PRUNED], kv_usage=1.0, waiting=4.0)
    kinds = [d.decide(traffic.read(), POLICY, CANARY).kind for _ in range(61)]
    assert kinds.index("rollback") == 60


def test_a_queue_before_a_cache_with_room_is_no_limit_reached() -> None:
    """Nor is a full cache that nobody waits for."""
    for usage, waiting in ((0.5, 4.0), (1.0, 0.0)):
        traffic = Traffic(POLICY)
        arm = traffic.arms[PRUNED]
        traffic.arms[PRUNED] = replace(arm, kv_usage=usage, waiting=waiting)
        assert {d.decide(traffic.read(), POLICY, CANARY).kind for _ in range(61)} == {"hold"}
