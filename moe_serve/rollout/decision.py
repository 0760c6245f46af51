"""What to do now, given what was seen: a pure function. Effects are the controller's.

Rolling back needs proof of harm, a hard limit, or too long without data. Advancing needs every
guard to exclude harm, and nothing else wrong. Everything else is waiting, and says for what.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from moe_serve.rollout.guards import Evidence, errors, latency, share, split_mismatch
from moe_serve.rollout.policy import GarbageGuard, Policy, QualityGuard, Step
from moe_serve.rollout.quality import Quality, garbage, quality
from moe_serve.rollout.state import State, enter, pause, roll_back
from moe_serve.rollout.window import Window

Kind = Literal["hold", "advance", "rollback", "pause"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do, why, and what it rests on."""

    kind: Kind
    reason: str
    """One of a few words, countable: ``harm``, ``blind``, ``inconclusive``, ..."""
    words: str
    """For a person."""
    evidence: tuple[Evidence, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            "kind": self.kind,
            "reason": self.reason,
            "words": self.words,
            "evidence": [found.to_json() for found in self.evidence],
        }


def apply(decision: Decision, state: State, policy: Policy, at: float) -> State:
    """The state after a decision was carried out."""
    if decision.kind == "advance":
        return enter(state, policy, state.step + 1, at)
    if decision.kind == "rollback":
        return roll_back(state, decision.words, at)
    if decision.kind == "pause":
        return pause(state, decision.words)
    return state


def judge(
    window: Window, policy: Policy, step: Step, probed: Quality | None, *, explain: bool
) -> tuple[Evidence, ...]:
    """All statistical guards of a step; without traffic only those that need none."""
    guards, found = policy.guards, []
    if step.traffic:
        found.append(errors(window, policy, step, explain=explain))
        found += [
            latency(name, guard, window, policy, step, explain=explain)
            for name, guard in guards.latency().items()
        ]
        found += [
            share(name, guard, window, policy, step, explain=explain)
            for name, guard in guards.shares().items()
        ]
    if isinstance(guards.quality, QualityGuard):
        found += quality(probed, guards.quality, policy, window.now)
    if isinstance(guards.garbage, GarbageGuard):
        found.append(garbage(probed, guards.garbage, policy, window.now))
    return tuple(found)


def decide(
    window: Window,
    policy: Policy,
    state: State,
    *,
    probed: Quality | None = None,
    explain: bool = True,
) -> Decision:
    """What to do now.

    Args:
        window: what was seen since the step began.
        policy: the rollout's.
        state: where it stands.
        probed: what probes said since the rollout began.
        explain: also estimate how much more is needed; takes longer.
    """
    if not state.active:
        return Decision(kind="hold", reason=state.phase, words=f"the rollout is {state.phase}")
    may_roll_back = state.phase != "paused" or policy.while_paused == "rollback"
    if found := _without_statistics(window, policy, may_roll_back=may_roll_back):
        return found
    if "promoted" in (state.phase, state.before):
        words = "everything goes to pruned; the hard limits are watched"
        return Decision(kind="hold", reason=state.phase, words=words)
    evidence = judge(window, policy, policy.steps[state.step], probed, explain=explain)
    if may_roll_back and (harmful := [e for e in evidence if e.verdict == "harm"]):
        words = "; ".join(_proof(e) for e in harmful)
        return Decision(kind="rollback", reason="harm", words=words, evidence=evidence)
    kind, reason, words = _onwards(window, policy, state, evidence)
    return Decision(kind=kind, reason=reason, words=words, evidence=evidence)


def _onwards(
    window: Window, policy: Policy, state: State, evidence: tuple[Evidence, ...]
) -> tuple[Kind, str, str]:
    """No harm is proven: wait, go on, or give up waiting."""
    step = policy.steps[state.step]
    missing = "; ".join(_missing(window, step, evidence))
    mismatch = split_mismatch(window, policy)
    late = window.now - state.began >= step.max_seconds
    kind: Kind = "hold"
    if state.phase == "paused":
        reason, words = "paused", f"paused: {state.reason or 'no reason given'}"
    elif late and (missing or mismatch):
        kind = policy.inconclusive
        reason = "inconclusive"
        words = f"no verdict after {_span(step.max_seconds)}: {mismatch or missing}"
    elif mismatch:
        reason = "split"
        words = f"{mismatch}; what is measured can't be trusted until that is cleared"
    elif step.traffic and window.requests <= 0 and window.seconds > 0:
        reason, words = "no-traffic", _no_traffic(step)
    elif missing:
        reason, words = "evidence", missing
    elif step.gate == "hand" and not state.released:
        reason, words = "gate", "harm is excluded; a person opens this gate (rollout resume)"
    elif policy.frozen(window.now):
        reason, words = "freeze", "harm is excluded; nothing advances in a freeze window"
    else:
        kind = "advance"
        reason, words = "fine", f"harm is excluded by {', '.join(e.guard for e in evidence)}"
    return kind, reason, words


def _no_traffic(step: Step) -> str:
    if step.shadow:
        return "no copies reach the pruned engine; is there traffic, and does the proxy mirror it?"
    return "no traffic is no evidence; send some, or use a shadow step"


def _without_statistics(window: Window, policy: Policy, *, may_roll_back: bool) -> Decision | None:
    """What comes before any guard: nowhere to go back to, a hard limit, no data."""
    if window.original_down:
        words = "the original is down; rolling back would send everything to it"
        return Decision(kind="hold", reason="original-down", words=words)
    if may_roll_back and (found := _hard(window, policy)):
        return found
    return _blind(window, policy, may_roll_back=may_roll_back) if window.trouble else None


def _hard(window: Window, policy: Policy) -> Decision | None:
    """Limits that need no statistics."""
    hard, now = policy.hard, window.now
    failed, requests = window.burst()
    found = ""
    if failed >= hard.failed_requests and failed >= hard.failed_share * requests:
        found = f"{failed:.0f} of {requests:.0f} pruned requests failed within a minute"
    elif _lasts(window.unhealthy_since, now, hard.unhealthy_seconds):
        found = f"the pruned engine is unhealthy for {_span(hard.unhealthy_seconds)}"
    elif window.restarts["pruned"] >= hard.restarts:
        found = f"the pruned engine restarted {window.restarts['pruned']} times"
    elif _lasts(window.full_since, now, hard.kv_seconds):
        found = f"the pruned engine's KV cache is full for {_span(hard.kv_seconds)}"
    return Decision(kind="rollback", reason="hard", words=found) if found else None


def _lasts(since: float | None, now: float, limit: float) -> bool:
    return since is not None and now - since >= limit


def _blind(window: Window, policy: Policy, *, may_roll_back: bool) -> Decision:
    blind = window.now - (window.now if window.blind_since is None else window.blind_since)
    if blind >= policy.blind_seconds and may_roll_back:
        words = f"{window.trouble}; no usable data for {_span(blind)}"
        return Decision(kind="rollback", reason="blind", words=words)
    return Decision(
        kind="hold",
        reason="blind",
        words=f"{window.trouble}; rolled back when that lasts {_span(policy.blind_seconds)}",
    )


def _missing(window: Window, step: Step, evidence: tuple[Evidence, ...]) -> list[str]:
    """What has to be there before the step is left, in words; empty when all is."""
    found = []
    if window.seconds < step.min_seconds:
        found.append(f"{_span(step.min_seconds - window.seconds)} of the minimum time")
    rate = window.requests / window.seconds if window.seconds > 0 else 0.0
    if step.traffic and window.requests < step.min_requests:
        found.append(_more("minimum", step.min_requests - window.requests, rate))
    for guard in evidence:
        if guard.verdict != "open":
            continue
        if guard.needs:
            found.append(f"{guard.guard}: {guard.needs}")
        elif guard.factor is not None:
            found.append(_more(guard.guard, (guard.factor - 1.0) * window.requests, rate))
        elif guard.pruned[1] > 0:
            gap = f"up to {guard.upper:+.4f} where less than {guard.limit:g} has to be shown"
            found.append(f"{guard.guard}: the difference is {gap}")
        else:
            found.append(f"{guard.guard}: no requests yet")
    return found


def _more(what: str, requests: float, rate: float) -> str:
    if rate <= 0.0:
        return f"{what}: more requests; none arrive now"
    count = _rounded(requests)
    return f"{what}: about {count} more requests, {_span(requests / rate)} at this rate"


def _rounded(number: float) -> str:
    """Two significant digits, upwards."""
    if number < 10.0:
        return f"{max(1, math.ceil(number))}"
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return f"{math.ceil(number / unit) * unit:,.0f}"


def _span(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2.0 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1.0):.0f} s"


def _proof(evidence: Evidence) -> str:
    k, n = evidence.pruned
    ko, no = evidence.original
    counts = f"{k:.0f} of {n:.0f} on pruned, {ko:.0f} of {no:.0f} on the original"
    return (
        f"{evidence.guard}: {evidence.said or counts}; "
        f"difference {evidence.lower:+.4f} to {evidence.upper:+.4f}, margin {evidence.margin:g} "
        f"({evidence.basis})"
    )
