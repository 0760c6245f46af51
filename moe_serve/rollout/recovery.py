"""Making record and routes tell the same again: after a crash, or after an edit by hand.

The routes are the truth about traffic, and a person's edit of them wins. Each row is a place
where a process can die between two writes:

======================================  ============================================
found                                   done
======================================  ============================================
intended, not written: a rollback       written now (the side of safety)
intended, not written: all else         given up; the state before it holds again
written, not recorded as such           recorded
written, not confirmed                  the proxy is asked, and it is recorded
the routes say something of nobody's    recorded as an edit; a rollout is paused, or
                                        rolled back where the edit says 0 %; or
                                        put back, where the stack says so (for routes
                                        that a deployment tool applies again)
======================================  ============================================
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moe_serve.errors import RolloutError
from moe_serve.rollout.policy import Policy
from moe_serve.rollout.record import Change
from moe_serve.rollout.state import State, pause, roll_back
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import routes_lock
from moe_serve.serving.routes import Split, new_split
from moe_serve.serving.routing import Routing, routing_of
from moe_serve.serving.sharing import wake_original
from moe_serve.serving.state import StackState


def recover(state: Path) -> tuple[str, ...]:
    """Do what the table says; return it in words.

    Raises:
        RolloutError: the record or the routes can't be read.
        Overtaken: someone moves traffic right now; ask again.
    """
    store, routing = Store(state), routing_of(state)
    with routes_lock(state, [], must=True):
        split = routing.read()
        done: list[str] = []
        changes = [c for c in store.history() if c.abandoned_at is None]
        while changes and changes[0].version != split.version and changes[0].written_at is None:
            last = changes[0]
            if last.decision == "rollback":
                split = replace(new_split(0.0, sticky=split.sticky), version=last.version)
                wake_original(StackState.load(state))
                routing.put(split)
                done.append("a rollback that was only intended is carried out")
            else:
                store.abandoned(last.id)
                done.append(f"{last.decision} to {last.percent_after:g} % was never written")
                changes.pop(0)
        if not changes:
            return tuple(done)
        if _is_its_own(changes[0], split):
            done += _finish(routing, store, changes[0])
        elif routing.restores:
            done.append(_restored(routing, store, changes[0], split))
        else:
            done.append(_edited(routing, store, changes[0], split))
        return tuple(done)


def _is_its_own(change: Change, split: Split) -> bool:
    return change.version == split.version and abs(change.percent_after - split.percent) < 0.005


def _finish(routing: Routing, store: Store, change: Change) -> list[str]:
    """The routes hold it: let the record say so, and the proxy's word with it."""
    done = []
    if change.written_at is None:
        store.written(change.id)
        done.append(f"{change.decision} to {change.percent_after:g} % had been written")
    if change.confirmed_at is None:
        try:
            in_force = routing.in_force() == change.version
        except RolloutError:
            return done
        if in_force:
            store.confirmed(change.id)
            done.append(f"{change.decision} to {change.percent_after:g} % is in force")
    return done


def _restored(routing: Routing, store: Store, last: Change, found: Split) -> str:
    """Put back what the record says, under its own version, and say who was overruled."""
    saved, (who, _) = store.saved(), routing.edited()
    shadow = 0.0
    if saved.state.active and saved.policy is not None:
        percent, copied = saved.state.target(Policy.model_validate_json(saved.policy))
        shadow = copied if percent == last.percent_after else 0.0
    wanted = replace(new_split(last.percent_after, shadow=shadow), version=last.version)
    words = f"{who}: {found.percent:g} %; put back to {last.percent_after:g} %"
    body = {"words": words, "found": found.percent, "restored": last.percent_after}
    store.note("restored", body)
    routing.put(wanted)
    return words


def _edited(routing: Routing, store: Store, last: Change, split: Split) -> str:
    present, (who, at) = store.saved().state, routing.edited()
    becomes: State | None = None
    reason = f"{who}: {split.percent:g} %"
    if present.active:
        becomes = pause(present, reason) if split.pruned else roll_back(present, reason, at)
    change = store.intend(
        actor="by hand",
        decision="edited",
        reason=reason,
        before=last.percent_after,
        after=split.percent,
        version=split.version,
        hashes=(last.hash_after, routing.digest()),
        state=becomes,
    )
    store.written(change)
    return reason
