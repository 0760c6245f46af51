"""What to do now, given what was seen: a pure function. Effects are the controller's.

Rolling back needs proof of harm, a hard limit, or too long without data. Advancing needs every
guard to exclude harm, and nothing else wrong. Everything else is waiting, and says for what.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_serve.rollout.guards import Evidence, errors, latency, share, split_mismatch
from moe_serve.rollout.margins import COUNTED_BY, GarbageGuard, QualityGuard
from moe_serve.rollout.policy import Policy, Step
from moe_serve.rollout.quality import Quality, garbage, quality
from moe_serve.rollout.said import codes, join, say
from moe_serve.rollout.state import State, enter, pause, roll_back
from moe_serve.rollout.window import Window
from moe_serve.serving.variants import PRUNED

Kind = Literal["hold", "advance", "rollback", "pause"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do, why, and what it rests on."""

    kind: Kind
    reason: str
    """One of a few words, countable: ``harm``, ``blind``, ``inconclusive``, ..."""
    words: str
    """For a person; a sentence that can be said in other languages (:mod:`.said`)."""
    evidence: tuple[Evidence, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            "kind": self.kind,
            "reason": self.reason,
            "words": self.words,
            "codes": codes(self.words),
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
            # A copy has no client who could go, or vote.
            if COUNTED_BY[name] == "engine" or step.weight
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
    exchanged: Sequence[str] = (),
    explain: bool = True,
) -> Decision:
    """What to do now.

    Args:
        window: what was seen since the step began.
        policy: the rollout's.
        state: where it stands.
        probed: what probes said since the rollout began.
        exchanged: variants that are not the checkpoint which the rollout began with.
        explain: also estimate how much more is needed; takes longer.
    """
    if not state.active:
        return Decision(kind="hold", reason=state.phase, words=say("inactive", phase=state.phase))
    may_roll_back = state.phase != "paused" or policy.while_paused == "rollback"
    if found := _without_statistics(window, policy, exchanged, may_roll_back=may_roll_back):
        return found
    if "promoted" in (state.phase, state.before):
        return Decision(kind="hold", reason=state.phase, words=say("promoted"))
    evidence = judge(window, policy, policy.steps[state.step], probed, explain=explain)
    if may_roll_back and (harmful := [e for e in evidence if e.verdict == "harm"]):
        words = join([_proof(e) for e in harmful])
        return Decision(kind="rollback", reason="harm", words=words, evidence=evidence)
    kind, reason, words = _onwards(window, policy, state, evidence)
    return Decision(kind=kind, reason=reason, words=words, evidence=evidence)


def _onwards(
    window: Window, policy: Policy, state: State, evidence: tuple[Evidence, ...]
) -> tuple[Kind, str, str]:
    """No harm is proven: wait, go on, or give up waiting."""
    step = policy.steps[state.step]
    missing = join(_missing(window, step, evidence))
    mismatch = split_mismatch(window, policy)
    late = window.waited(state.began) >= step.max_seconds
    kind: Kind = "hold"
    words: str
    if state.phase == "paused":
        why = state.codes or state.reason or say("no-reason")
        reason, words = "paused", say("paused", why=why)
    elif late and (missing or mismatch):
        kind = policy.inconclusive
        reason = "inconclusive"
        words = say("inconclusive", span=step.max_seconds, missing=mismatch or missing)
    elif mismatch:
        reason = "split"
        words = say("split-holds", mismatch=mismatch)
    elif step.traffic and window.requests <= 0 and window.seconds > 0:
        reason, words = "no-traffic", say("no-copies" if step.shadow else "no-traffic")
    elif missing:
        reason, words = "evidence", missing
    elif step.gate == "hand" and not state.released:
        reason, words = "gate", say("gate")
    elif policy.frozen(window.now):
        reason, words = "freeze", say("freeze")
    else:
        kind = "advance"
        reason, words = "fine", say("fine", guards=[e.guard for e in evidence])
    return kind, reason, words


def _without_statistics(
    window: Window, policy: Policy, exchanged: Sequence[str], *, may_roll_back: bool
) -> Decision | None:
    """What comes before any guard: nowhere to go back to, other models, a hard limit, blindness."""
    if window.original_down:
        return Decision(kind="hold", reason="original-down", words=say("original-down"))
    if exchanged:
        # What was shown of the others says nothing of these, whoever paused and for what reason.
        words = say("exchanged", who=list(exchanged))
        return Decision(kind="rollback", reason="exchanged", words=words)
    if may_roll_back and (found := _hard(window, policy)):
        return found
    return _blind(window, policy, may_roll_back=may_roll_back) if window.trouble else None


def _hard(window: Window, policy: Policy) -> Decision | None:
    """Limits that need no statistics."""
    hard, now = policy.hard, window.now
    failed, requests = window.burst()
    found: str = ""
    if failed >= hard.failed_requests and failed >= hard.failed_share * requests:
        found = say("burst", failed=failed, requests=requests)
    elif _lasts(window.unhealthy_since, now, hard.unhealthy_seconds):
        found = say("unhealthy", span=hard.unhealthy_seconds)
    elif len(window.restarts[PRUNED]) >= hard.restarts:
        found = say("restarted", times=len(window.restarts[PRUNED]))
    elif _lasts(window.full_since, now, hard.kv_seconds):
        found = say("full", span=hard.kv_seconds)
    return Decision(kind="rollback", reason="hard", words=found) if found else None


def _lasts(since: float | None, now: float, limit: float) -> bool:
    return since is not None and now - since >= limit


def _blind(window: Window, policy: Policy, *, may_roll_back: bool) -> Decision:
    blind = window.now - (window.now if window.blind_since is None else window.blind_since)
    if blind >= policy.blind_seconds and may_roll_back:
        words = say("blind", trouble=window.trouble, span=blind)
        return Decision(kind="rollback", reason="blind", words=words)
    words = say("blind-holds", trouble=window.trouble, span=policy.blind_seconds)
    return Decision(kind="hold", reason="blind", words=words)


def _missing(window: Window, step: Step, evidence: tuple[Evidence, ...]) -> list[str]:
    """What has to be there before the step is left, in words; empty when all is."""
    found: list[str] = []
    if window.seconds < step.min_seconds:
        found.append(say("min-time", span=step.min_seconds - window.seconds))
    rate = window.requests / window.seconds if window.seconds > 0 else 0.0
    if step.traffic and window.requests < step.min_requests:
        found.append(_more("", step.min_requests - window.requests, rate))
    for guard in evidence:
        if guard.verdict != "open":
            continue
        if guard.needs:
            found.append(say("needs", guard=guard.guard, needs=guard.needs))
        elif guard.factor is not None:
            found.append(_more(guard.guard, (guard.factor - 1.0) * window.requests, rate))
        elif guard.pruned[1] > 0:
            found.append(say("gap", guard=guard.guard, upper=guard.upper, limit=guard.limit))
        else:
            found.append(say("no-requests", guard=guard.guard))
    return found


def _more(guard: str, requests: float, rate: float) -> str:
    """For a guard, or for the step's minimum."""
    code, values = ("more", {"guard": guard}) if guard else ("minimum", {})
    if rate <= 0.0:
        return say(f"{code}-stalled", **values)
    return say(code, count=_rounded(requests), span=requests / rate, **values)


def _rounded(number: float) -> str:
    """Two significant digits, upwards."""
    if number < 10.0:
        return f"{max(1, math.ceil(number))}"
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return f"{math.ceil(number / unit) * unit:,.0f}"


def _proof(evidence: Evidence) -> str:
    k, n = evidence.pruned
    ko, no = evidence.original
    return say(
        "harm",
        guard=evidence.guard,
        seen=evidence.said or say("counts", k=k, n=n, ko=ko, no=no),
        lower=evidence.lower,
        upper=evidence.upper,
        margin=evidence.margin,
        basis=evidence.basis,
    )
