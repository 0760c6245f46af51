"""The rollout as API and page show it, put together from store, route file, trace and policy."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moe_serve.rollout import schema
from moe_serve.rollout.policy import Hooks, Policy, load_policy
from moe_serve.rollout.record import Change, Entry, Saved
from moe_serve.rollout.store import Store
from moe_serve.rollout.trace import Trace
from moe_serve.rollout.traffic import status
from moe_serve.rollout.window import Window
from moe_serve.serving.state import StackState


def look(state: Path) -> schema.Status:
    """Where traffic goes and how the rollout stands.

    Raises:
        RolloutError: no stack was ever here, or its record or routes can't be read.
    """
    found, saved = status(state), Store(state).saved()
    policy = Policy.model_validate_json(saved.policy) if saved.policy is not None else None
    last = found["last_change"]
    return schema.Status.model_validate(
        {
            **found,
            "at": time.time(),
            "model": StackState.load(state).served_model,
            "steps": [step.model_dump() for step in policy.steps] if policy else [],
            "dry_run": policy is not None and saved.state.active and policy.dry_run,
            "step_began": saved.state.began,
            "step_seconds": _watched(saved),
            "actions": _actions(found, saved, policy),
            "last_change": {**last, "evidence": last["evidence"] or None} if last else None,
        }
    )


def _watched(saved: Saved) -> float:
    window = Window.from_json(saved.seen.get("window", {}))
    return window.waited(saved.state.began) if window is not None else 0.0


def _actions(found: dict[str, Any], saved: Saved, policy: Policy | None) -> list[schema.Action]:
    """What can be done now; a share can be set by hand at any time."""
    actions: list[schema.Action] = ["set"]
    if saved.state.active:
        if saved.state.phase not in ("paused", "promoted"):
            actions.append("pause")
        if policy is not None and _can_resume(saved, policy):
            actions.append("resume")
    elif found["controller"] is not None:
        actions.append("start")
    if found["pruned_percent"] < 100.0:
        actions.append("promote")
    if found["pruned_percent"] > 0.0 or found["shadow_percent"] > 0.0 or saved.state.active:
        actions.append("rollback")
    return actions


def _can_resume(saved: Saved, policy: Policy) -> bool:
    """After a pause; or where a step waits for a person, or will."""
    if saved.state.phase in ("shadow", "canary"):
        return policy.steps[saved.state.step].gate == "hand" and not saved.state.released
    return saved.state.phase == "paused"


def history(state: Path, limit: int, before: int | None) -> schema.HistoryPage:
    """Changes, newest first.

    Raises:
        RolloutError: the record can't be read.
    """
    found = Store(state).history(limit + 1, before)
    more = len(found) > limit
    return schema.HistoryPage(
        changes=[change_out(change) for change in found[:limit]],
        next_before=found[limit - 1].id if more else None,
    )


def change_out(change: Change) -> schema.ChangeOut:
    """As the API tells it."""
    return schema.ChangeOut(**{**change.to_json(), "evidence": change.evidence or None})


def entry_out(entry: Entry) -> schema.LogEntry:
    """As an event tells it; a policy is asked for by itself, and without its secrets."""
    body = {name: value for name, value in entry.body.items() if name != "policy"}
    at = float(body.get("at", 0.0))
    return schema.LogEntry(id=entry.id, kind=entry.kind, at=at, body=body)


def guards(state: Path, most: int) -> schema.Guards:
    """Guards of the present rollout, or of the last one, with their histories.

    Raises:
        RolloutError: the record or the trace can't be read.
    """
    store = Store(state)
    began = store.began() or 0.0
    points = Trace(state).points(began, most)
    evidence = store.saved().seen.get("decision", {}).get("evidence", [])
    present = {e["guard"]: schema.Guard.model_validate(e) for e in evidence}
    names = [*present, *(name for name in points if name not in present)]
    return schema.Guards(
        since=began,
        guards=[
            schema.GuardHistory(
                guard=name,
                unit=present[name].unit if name in present else points[name][-1].unit,
                now=present.get(name),
                points=[schema.PointOut.model_validate(p) for p in points.get(name, [])],
            )
            for name in names
        ],
    )


def rules(state: Path) -> Policy:
    """What the next rollout begins with: the file that ``up`` was given, or the default.

    Raises:
        UsageError: the file can't be used any more.
    """
    path = StackState.load(state).policy
    return load_policy(Path(path)) if path is not None else Policy()


def policy(state: Path) -> schema.PolicyOut:
    """Of the rollout under way, or the next one's.

    Raises:
        RolloutError: no stack was ever here, or its record can't be read.
        UsageError: the policy's file can't be used any more.
    """
    saved = Store(state).saved()
    if saved.state.active and saved.policy is not None:
        found, running = Policy.model_validate_json(saved.policy), True
    else:
        found, running = rules(state), False
    given = StackState.load(state).policy is not None
    return schema.PolicyOut(
        source="running" if running else "file" if given else "default",
        digest=found.digest,
        policy=found.model_copy(update={"hooks": _shown(found.hooks)}),
    )


def _shown(hooks: Hooks) -> Hooks:
    """Without what may be a secret: an address's path, a command's arguments."""
    told = hooks.model_copy(update={"command": hooks.command[:1]})
    if hooks.webhook is None:
        return told
    parts = urlsplit(hooks.webhook)
    host = parts.netloc.rpartition("@")[2]
    return told.model_copy(update={"webhook": f"{parts.scheme}://{host}/"})
