"""What counts and what does not."""

from __future__ import annotations

import json
from dataclasses import replace

from moe_serve.rollout.window import Window
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.readings import PLAIN, Traffic

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
        traffic.arms[name] = replace(traffic.arms[name], started=100.0)
    traffic.warm()
    traffic.serve(PRUNED, 10)
    traffic.arms[PRUNED] = replace(traffic.arms[PRUNED], started=200.0)
    window = traffic.read()
    assert (window.restarts[PRUNED], window.requests) == (1, 0)
    assert window.trouble == "counters of pruned began anew (a restart)"


def test_it_survives_the_store() -> None:
    """Through JSON and back, and goes on counting after one more baseline."""
    traffic = Traffic(POLICY)
    traffic.warm()
    traffic.serve(PRUNED, 10, failed=2, slow=1)
    traffic.serve(ORIGINAL, 10)
    window = traffic.read()
    again = Window.from_json(json.loads(json.dumps(window.to_json())))
    assert again.to_json() == window.to_json()
    traffic.window = again
    traffic.serve(PRUNED, 10)
    assert traffic.read().requests == 10
    traffic.serve(PRUNED, 5)
    assert traffic.read().requests == 15
