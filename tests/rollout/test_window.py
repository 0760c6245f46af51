"""What counts and what does not."""

from __future__ import annotations

import json
from dataclasses import replace

from moe_serve.rollout.reading import Reading
from moe_serve.rollout.window import Window
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.readings import EMPTY, PLAIN, Traffic

POLICY = PLAIN


def test_warm_up_is_left_out_by_rule() -> None:
    """Requests of the first 30 s are not evidence, those after are."""
    traffic = Traffic(POLICY)
    for _ in range(6):
        traffic.serve(PRUNED, 10)
        traffic.read()
    assert traffic.window.requests == 0
    traffic.read()
    traffic.serve(PRUNED, 10)
    assert traffic.read().requests == 10


def test_counts_fall_into_the_stratum_of_their_load() -> None:
    """Edges 2, 8, 32, 128: loads 1 and 9 are strata 0 and 2; an interval takes its ends' mean."""
    traffic = Traffic(POLICY)
    traffic.warm()
    traffic.serve(PRUNED, 10, slow=1, load=1)
    traffic.read()
    traffic.serve(PRUNED, 20, slow=2, load=17)
    traffic.read()
    ttft = traffic.window.over["ttft"]
    assert {s: ttft[s][PRUNED] for s in ttft} == {0: [1, 10], 2: [2, 20]}


def test_a_clock_that_jumps_gives_no_counts() -> None:
    """Wall clock an hour ahead, monotonic clock five seconds."""
    traffic = Traffic(POLICY)
    traffic.warm()
    traffic.serve(PRUNED, 10)
    traffic.at += 3600
    assert traffic.read().trouble == "the clock jumped"
    assert traffic.window.requests == 0
    assert traffic.read().trouble == ""


def test_what_the_proxy_noted_before_a_clock_was_set_is_still_found() -> None:
    """Set back by an hour, lines since the window began lie an hour earlier; forth, they stay."""
    traffic = Traffic(POLICY)
    traffic.warm()
    began = traffic.window.began
    traffic.at += 3600
    assert traffic.read().began == began
    traffic.at -= 3600
    assert traffic.read().began == began - 3600


def test_a_gap_gives_no_counts() -> None:
    """Nothing read for ten minutes: which load the requests met is not known."""
    traffic = Traffic(POLICY)
    traffic.warm()
    traffic.serve(PRUNED, 10)
    assert traffic.read(600).trouble == "nothing was read for 600 s"
    assert traffic.window.requests == 0


def test_another_process_is_a_restart_even_if_its_counters_are_higher() -> None:
    """The process's own start time says so."""
    traffic = Traffic(POLICY)
    for name in (ORIGINAL, PRUNED):
        traffic.arms[name] = replace(traffic.arms[name], engines={"": 100.0})
    traffic.warm()
    traffic.serve(PRUNED, 10)
    traffic.arms[PRUNED] = replace(traffic.arms[PRUNED], engines={"": 200.0})
    window = traffic.read()
    assert (len(window.restarts[PRUNED]), window.requests) == (1, 0)
    assert window.trouble == "counters of pruned began anew (a restart)"


def engines(traffic: Traffic, *counts: float, started: float = 100.0) -> Window:
    """A reading of as many pruned engines, each with its lifetime's requests."""
    names = {f"instance={i}": started for i in range(len(counts))}
    traffic.arms[PRUNED] = EMPTY
    traffic.serve(PRUNED, sum(counts))
    traffic.arms[PRUNED] = replace(
        traffic.arms[PRUNED], engines=names, parts=frozenset(names), running=1.0
    )
    return traffic.read()


def test_engines_that_come_and_go_bring_no_evidence_and_are_no_crash_loop() -> None:
    """A sum over engines that loses one with 9,000 requests and gets it back saw none of them.

    Nor is it a restart, however often an autoscaler does it; the 20 requests between are counted.
    """
    traffic = Traffic(POLICY)
    traffic.warm()
    engines(traffic, 1000, 9000)
    for seen in range(4):
        counted = traffic.window.requests
        window = engines(traffic, 1000 + 20 * seen)
        assert window.trouble == "others of pruned are counted than before"
        engines(traffic, 1010 + 20 * seen)
        assert engines(traffic, 1010 + 20 * seen, 9000).trouble == window.trouble
        engines(traffic, 1020 + 20 * seen, 9000)
        assert window.requests == counted + 20
    assert window.restarts[PRUNED] == []
    engines(traffic, 1080, 5, started=200.0)
    assert len(window.restarts[PRUNED]) == 2


def test_a_proxy_that_begins_anew_is_no_restart_of_the_engine() -> None:
    """Its requests are counted from zero again, the engine's are not."""
    traffic = Traffic(POLICY)
    traffic.warm()
    traffic.serve(PRUNED, 100)
    traffic.read()
    traffic.arms[PRUNED] = replace(traffic.arms[PRUNED], requests=0.0)
    window = traffic.read()
    assert (window.trouble != "", window.restarts[PRUNED]) == (True, [])


def test_a_probe_that_is_counted_ahead_is_no_restart() -> None:
    """Engines count, and one is late with it: two requests of a probe are known, one is seen."""
    traffic = Traffic(POLICY)
    traffic.warm()
    arm = replace(traffic.arms[PRUNED], counts_probes=True, requests=10.0)
    for requests, probes in ((10.0, 0.0), (11.0, 2.0), (15.0, 2.0)):
        traffic.arms[PRUNED] = replace(
            arm, requests=requests, probes={"truncated": (0.0, probes)}, shares=arm.shares
        )
        window = traffic.read()
        assert window.trouble == ""
    assert (window.requests, window.restarts[PRUNED]) == (3.0 + 10.0, [])


def test_it_survives_the_store() -> None:
    """Through JSON and back, and goes on counting after one more baseline."""
    traffic = Traffic(POLICY)
    traffic.warm()
    traffic.serve(PRUNED, 10, failed=2, slow=1)
    traffic.serve(ORIGINAL, 10)
    window = traffic.read()
    again = Window.from_json(json.loads(json.dumps(window.to_json())))
    assert again is not None
    assert again.to_json() == window.to_json()
    assert Window.from_json({**window.to_json(), "restarts": 1, "of-old": 2}) is None
    traffic.window = again
    traffic.serve(PRUNED, 10)
    assert traffic.read().requests == 10
    traffic.serve(PRUNED, 5)
    assert traffic.read().requests == 15


def test_a_step_that_was_not_watched_has_not_been_waited_for() -> None:
    """Its time begins with the first reading of it."""
    traffic = Traffic(POLICY)
    traffic.warm()
    assert traffic.window.waited(-1.0) == 0.0


def test_a_crowd_that_was_counted_stays_counted() -> None:
    """Two users with 5 and 5, (10, 50); a reader that begins anew has seen only (6, 18) of them."""
    traffic = Traffic(POLICY)
    for at, crowd in enumerate([(10.0, 50.0), (6.0, 18.0)]):
        reading = Reading(at=at, tick=at, arms=traffic.arms, crowds={PRUNED: list(crowd)})
        traffic.window.add(reading, POLICY)
    assert traffic.window.crowds == {ORIGINAL: [0, 0], PRUNED: [10, 50]}
    # A request meets 50 / 10 of its own user's.
    assert traffic.window.per_user(PRUNED) == 5.0
