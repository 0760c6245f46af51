"""What is decided: the complaints of users of other tools, each as a case."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest

from moe_serve.rollout import decision as d
from moe_serve.rollout import guards as g
from moe_serve.rollout import state as s
from moe_serve.rollout.margins import Guards, ShareGuard
from moe_serve.rollout.policy import Freeze, Policy, Step
from moe_serve.rollout.sequential import log_share_e_process, lower_rate, upper_rate
from moe_serve.rollout.window import Window
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.readings import START, UNPROBED, Traffic

HALF = Step(weight=50.0, min_seconds=60.0, min_requests=100, max_seconds=3600.0)
POLICY = Policy(steps=(HALF,), guards=UNPROBED)
CANARY = s.begin(POLICY, START)


def after(
    ticks: int,
    *,
    policy: Policy = POLICY,
    state: s.State = CANARY,
    original: tuple[float, float, float] = (50, 0, 0),
    pruned: tuple[float, float, float] = (50, 0, 0),
) -> d.Decision:
    """Decide after steady traffic of (requests, failed, slow) per five seconds."""
    traffic = Traffic(policy)
    traffic.warm()
    for _ in traffic.steadily(ticks, original, pruned):
        pass
    return d.decide(traffic.window, policy, state)


def test_enough_good_traffic_advances() -> None:
    """3,000 requests on each side and no failure: below 0.5 % is shown, all minimums hold."""
    found = after(60)
    assert (found.kind, found.reason) == ("advance", "fine")
    assert {e.guard: e.verdict for e in found.evidence} == dict.fromkeys(
        ("errors", "ttft", "tpot", "truncated", "empty"), "fine"
    )


@pytest.mark.parametrize("name", ["abandoned", "feedback"])
def test_copies_have_no_clients_who_could_go_or_vote(name: str) -> None:
    """Of a shadow step it is not asked; of users' requests it is."""
    guards = Guards.model_validate({"quality": "off", name: ShareGuard(margin=0.05)})
    policy = Policy(steps=(Step(weight=0.0, shadow=50.0), Step(weight=50.0)), guards=guards)
    for step in policy.steps:
        window = Window(began=START, weight=step.weight, shadow=step.shadow)
        judged = d.judge(window, policy, step, None, explain=False)
        assert (name in {e.guard for e in judged}) is not bool(step.shadow)


def test_one_failure_of_few_requests_is_no_disaster() -> None:
    """At near-zero traffic one failure is 20 %: the sequence knows its own uncertainty."""
    traffic = Traffic(POLICY)
    traffic.warm()
    traffic.serve(PRUNED, 5, failed=1)
    traffic.serve(ORIGINAL, 5)
    assert d.decide(traffic.read(), POLICY, CANARY).kind == "hold"


def test_harm_rolls_back() -> None:
    """Two points more failures than the original, margin half a point."""
    found = after(120, pruned=(50, 1, 0))
    assert (found.kind, found.reason) == ("rollback", "harm")
    assert "margin 0.005" in found.words
    assert found.evidence[0].verdict == "harm"
    assert found.to_json()["codes"]["code"] == "harm"
    assert found.to_json()["evidence"][0]["codes"]["basis"]["code"] == "basis-errors"


def test_harm_lies_beyond_the_margin() -> None:
    """At the margin nothing is proven by the interval; by a test besides it, it is."""
    counts = {PRUNED: (5.0, 9.0), ORIGINAL: (0.0, 9.0)}

    def judged(lower: float, upper: float, *, proven: bool) -> g.Evidence:
        compared = g._Compared(
            guard="errors",
            margin=0.25,
            limit=0.125,
            counts=counts,
            lower=lower,
            upper=lambda _times: upper,
            basis="",
            proven=proven,
            needs="votes",
        )
        return compared.judged(explain=False)

    def verdict(lower: float, upper: float, *, proven: bool) -> str:
        return judged(lower, upper, proven=proven).verdict

    assert verdict(0.25, 0.5, proven=False) == "open"
    assert verdict(0.2501, 0.5, proven=False) == "harm"
    assert verdict(0.0, 0.25, proven=True) == "harm"
    assert verdict(0.0, 0.2499, proven=True) == "open"
    assert judged(0.0, 0.2, proven=False).needs == "votes"
    assert judged(0.0, 0.1, proven=False).needs == ""
    # Fine is below the limit, not at it.
    assert (verdict(0.0, 0.125, proven=False), verdict(0.0, 0.1249, proven=False)) == (
        "open",
        "fine",
    )


def test_each_end_has_its_part_of_the_level() -> None:
    """Ends of two rates for a share; of two rates in five strata for latency; half for each way."""
    found = {e.guard: e for e in after(40, original=(50, 0, 1), pruned=(50, 0, 2)).evidence}
    # Five guards and one step: a rollback's 1 % is split over five tests.
    back, ahead = 0.01 / 5, 0.05
    truncated, ttft = found["truncated"], found["ttft"]
    assert truncated.upper == upper_rate(0, 2000, ahead / 2) - lower_rate(0, 2000, ahead / 2)
    assert truncated.lower == lower_rate(0, 2000, back / 2) - upper_rate(0, 2000, back / 2)
    assert ttft.upper == pytest.approx(
        upper_rate(80, 2000, ahead / 2 / 10) - lower_rate(40, 2000, ahead / 2 / 10)
    )
    assert ttft.lower == pytest.approx(
        lower_rate(80, 2000, back / 2 / 10) - upper_rate(40, 2000, back / 2 / 10)
    )


def test_slowness_without_an_original_to_blame() -> None:
    """All traffic at pruned: 1,000 of 1,000 over the objective, where a tenth is allowed."""
    found = after(20, original=(0, 0, 0), pruned=(50, 0, 50))
    (ttft,) = [e for e in found.evidence if e.guard == "ttft"]
    assert ttft.verdict == "harm"
    assert ttft.lower == pytest.approx(lower_rate(1000, 1000, 0.01 / 5 / 2 / 2) - 0.1)


def test_new_failures_are_seen_where_the_original_has_none() -> None:
    """Spinnaker #5622: nothing to divide by is no reason to pass."""
    found = after(120, original=(50, 0, 0), pruned=(50, 2, 0))
    assert found.kind == "rollback"


def test_equal_misery_is_not_the_pruned_variants_fault() -> None:
    """Both fail in 4 %, both are slow in a fifth: no rollback."""
    found = after(400, original=(50, 2, 10), pruned=(50, 2, 10))
    assert found.kind != "rollback"


def test_a_slow_pruned_variant_rolls_back() -> None:
    """A tenth over the objective against a fiftieth, at equal load."""
    found = after(200, original=(50, 0, 1), pruned=(50, 0, 10))
    assert found.reason == "harm"
    assert "ttft" in found.words


def test_harm_rolls_back_while_waiting_for_a_person() -> None:
    """Flagger #1801; and with ``while_paused = "nothing"`` it waits."""
    paused = s.pause(CANARY, "lunch")
    assert after(120, state=paused, pruned=(50, 2, 0)).kind == "rollback"
    policy = POLICY.model_copy(update={"while_paused": "nothing"})
    assert after(120, policy=policy, state=paused, pruned=(50, 2, 0)).kind == "hold"


def test_paused_does_not_advance() -> None:
    """However good the evidence."""
    found = after(100, state=s.pause(CANARY, "lunch"))
    assert (found.kind, found.reason, found.words) == ("hold", "paused", "paused: lunch")


@pytest.mark.parametrize("what", ["hold", "pause", "rollback"])
def test_inconclusive_is_respected(what: str) -> None:
    """At the maximum time the policy's word counts, with what was missing."""
    policy = POLICY.model_copy(update={"inconclusive": what})
    found = after(800, policy=policy, original=(1, 0, 0), pruned=(0.1, 0, 0))
    assert (found.kind, found.reason) == (what, "inconclusive")
    assert "no verdict after 60 minutes" in found.words


def test_inconclusive_can_be_resumed_and_evidence_is_kept() -> None:
    """Argo #3850, #3015, #747: going on neither forgets what was seen nor is stuck at once."""
    traffic = Traffic(POLICY)
    traffic.warm()
    for _ in traffic.steadily(800, (0.5, 0, 0), (0.5, 0, 0)):
        pass
    found = d.decide(traffic.window, POLICY, CANARY)
    state = d.apply(found, CANARY, POLICY, traffic.at)
    assert state.phase == "paused"
    resumed = s.resume(state, traffic.at)
    assert (resumed.phase, resumed.step) == ("canary", 0)
    assert d.decide(traffic.window, POLICY, resumed).reason == "evidence"
    for _ in traffic.steadily(60, (50, 0, 0), (50, 0, 0)):
        pass
    assert d.decide(traffic.window, POLICY, resumed).kind == "advance"


def test_a_late_verdict_is_still_a_verdict() -> None:
    """All guards passed but a person's gate is shut: waiting past the maximum is no failure."""
    gated = HALF.model_copy(update={"gate": "hand", "max_seconds": 100.0})
    policy = POLICY.model_copy(update={"steps": (gated,)})
    state = s.begin(policy, START)
    assert after(60, policy=policy, state=state).reason == "gate"
    assert after(60, policy=policy, state=s.resume(state, START)).kind == "advance"


def test_the_odds_that_failures_speak_are_said() -> None:
    """Eleven of pruned's, none of the original's, half of the traffic each, ratio 2.

    A failure is pruned's with probability 2/3 at most; the e-process of eleven in eleven.
    """
    found = after(11, pruned=(50, 1, 0)).evidence[0].to_json()["codes"]["basis"]
    assert found["ratio"] == 2.0
    assert found["odds"] == pytest.approx(math.exp(log_share_e_process(11, 11, 2 / 3)))


def test_failures_that_are_all_pruneds_prove_harm_before_the_rates_do() -> None:
    """Five guards, two tests of this one: 1 % / 5 / 2 is one in a thousand.

    Nineteen of nineteen speak 727 : 1, twenty 1,064 : 1, while the rates' interval holds zero.
    """
    verdicts = {}
    for failures in (19, 20):
        evidence = after(failures, pruned=(50, 1, 0)).evidence[0]
        assert evidence.lower < 0.0 < evidence.upper
        verdicts[failures] = evidence.verdict
    assert verdicts == {19: "open", 20: "harm"}


def test_the_proof_says_what_was_compared() -> None:
    """Counts, ends, margin and basis."""
    found = after(120, pruned=(50, 1, 0))
    values = found.to_json()["codes"]
    assert (values["guard"], values["basis"]["code"]) == ("errors", "basis-errors")
    assert (values["seen"]["k"], values["seen"]["n"]) == (120, 6000)


def test_the_steps_own_minimum_is_said_as_such() -> None:
    """A hundred requests, of which fifty are there."""
    words = after(1).words
    assert "minimum: about 50 more requests" in words


def test_a_share_that_nobody_counted_has_no_counts() -> None:
    """Nothing of nothing; and what it is compared with is said."""
    window = Window(began=0.0, weight=50.0)
    guard = POLICY.guards.shares()["truncated"]
    found = g.share("truncated", guard, window, POLICY, HALF, explain=False)
    assert found.pruned == found.original == (0.0, 0.0)
    assert found.basis == "original, answers"
    assert found.needs


def test_a_rate_below_one_a_second_is_a_rate() -> None:
    """Ten more at one in two seconds take twenty; none at all take for ever."""
    assert d._more("errors", 10.0, 0.5) == "errors: about 10 more requests, 20 s at this rate"
    assert d._more("errors", 10.0, 0.0) == "errors: more requests; none arrive now"


def test_another_checkpoint_ends_a_rollout() -> None:
    """Whatever was seen of the one before."""
    found = d.decide(Window(began=0.0), POLICY, CANARY, exchanged=(PRUNED,))
    assert (found.kind, found.reason) == ("rollback", "exchanged")
    assert found.words.startswith("pruned: another checkpoint is served")


def test_a_split_that_is_not_as_asked_holds() -> None:
    """A third of the requests where half should be: no verdict on such data."""
    found = after(60, original=(100, 0, 0), pruned=(50, 0, 0))
    assert (found.kind, found.reason) == ("hold", "split")
    assert "33.33 % of the requests reached pruned where 50 % should" in found.words


@pytest.mark.parametrize("weight", [0.0, 100.0])
def test_where_nothing_is_split_nothing_is_amiss(weight: float) -> None:
    """Copies, or all traffic on one side."""
    assert g.split_mismatch(Window(began=0.0, weight=weight), POLICY) == ""


def test_nothing_advances_in_a_freeze_window() -> None:
    """START is a Friday."""
    assert datetime.fromtimestamp(START, UTC).strftime("%a") == "Fri"
    policy = POLICY.model_copy(update={"freeze": (Freeze(days=("fri",)),)})
    assert after(60, policy=policy).reason == "freeze"
    assert after(120, policy=policy, pruned=(50, 2, 0)).kind == "rollback"


def test_a_frozen_day_is_frozen_to_its_end() -> None:
    """The last second of Friday is Friday's, and the first of Saturday is not."""
    freeze = Freeze(days=("fri",))
    friday = datetime(2027, 1, 15, 23, 59, 59, 700_000, UTC)
    assert freeze.covers(friday)
    assert not freeze.covers(friday + timedelta(seconds=0.3))


def test_different_loads_are_not_compared() -> None:
    """Pruned idles at load 1, the original queues at load 100: against the objective then."""
    traffic = Traffic(POLICY)
    traffic.warm()
    for _ in range(100):
        traffic.serve(ORIGINAL, 50, slow=25, load=100.0)
        traffic.serve(PRUNED, 50, slow=10, load=1.0)
        traffic.read()
    found = d.decide(traffic.window, POLICY, CANARY)
    (ttft,) = [e for e in found.evidence if e.guard == "ttft"]
    assert "the objective" in ttft.basis
    # A fifth over the objective, a tenth allowed: not fine, though the original is worse.
    assert ttft.verdict == "open"


def test_dependent_requests_count_for_less() -> None:
    """With a design effect of four, what was enough is not."""
    policy = POLICY.model_copy(update={"design_effect": 4.0})
    assert after(60, policy=policy).reason == "evidence"
    assert after(240, policy=policy).kind == "advance"


def test_the_walk_through_the_steps() -> None:
    """Shadow, canary, promoted; a rollback ends it from anywhere."""
    policy = Policy(steps=(Step(weight=0, shadow=5), Step(weight=1), HALF))
    advance = d.Decision(kind="advance", reason="", words="")
    state, phases = s.begin(policy, START), []
    for _ in range(4):
        phases.append((state.phase, *state.target(policy)))
        back = d.apply(d.Decision(kind="rollback", reason="", words="w"), state, policy, 1.0)
        assert (back.phase, back.target(policy)) == ("rolled_back", (0.0, 0.0))
        state = d.apply(advance, state, policy, START)
    assert phases == [
        ("shadow", 0.0, 5.0),
        ("canary", 1.0, 0.0),
        ("canary", 50.0, 0.0),
        ("promoted", 100.0, 0.0),
    ]


def test_promoted_keeps_its_hard_limits() -> None:
    """There is nothing left to compare with, and still a burst rolls back."""
    state = s.enter(CANARY, POLICY, 1, START)
    promoted = after(10, state=state)
    assert promoted.reason == "promoted"
    assert promoted.words == "everything goes to pruned; the hard limits are watched"
    assert after(10, state=s.pause(state, ""), pruned=(50, 50, 0)).kind == "rollback"


def test_idle_does_nothing() -> None:
    """And neither does what was rolled back."""
    for phase in ("idle", "rolled_back"):
        assert d.decide(Window(began=0.0), POLICY, s.State(phase=phase)).kind == "hold"
