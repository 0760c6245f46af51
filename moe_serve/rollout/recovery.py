"""Making record and route file tell the same again: after a crash, or after an edit by hand.

The route file is the truth about traffic, and a person's edit of it wins. Each row is a place
where a process can die between two writes:

======================================  ============================================
found                                   done
======================================  ============================================
intended, file not written: a rollback  written now (the side of safety)
intended, file not written: all else    given up; the state before it holds again
file written, not recorded as such      recorded
written, not confirmed                  Envoy is asked, and it is recorded
the file says something of nobody's     recorded as an edit; a rollout is paused, or
                                        rolled back where the edit says 0 %
======================================  ============================================
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from moe_serve.errors import RolloutError
from moe_serve.rollout.state import State, pause, roll_back
from moe_serve.rollout.store import Change, Store
from moe_serve.rollout.traffic import routes_lock
from moe_serve.serving.envoy import Admin
from moe_serve.serving.routes import Split, new_split, put_split, read_split, route_file
from moe_serve.serving.state import StackState


def recover(state: Path) -> tuple[str, ...]:
    """Do what the table says; return it in words.

    Raises:
        RolloutError: the record or the route file can't be read.
        Overtaken: someone moves traffic right now; ask again.
    """
    store = Store(state)
    with routes_lock(state, [], must=True):
        split = read_split(state)
        done: list[str] = []
        changes = [c for c in store.history() if c.abandoned_at is None]
        while changes and changes[0].version != split.version and changes[0].written_at is None:
            last = changes[0]
            if last.decision == "rollback":
                split = replace(new_split(0.0, sticky=split.sticky), version=last.version)
                put_split(state, split)
                done.append("a rollback that was only intended is carried out")
            else:
                store.abandoned(last.id)
                done.append(f"{last.decision} to {last.percent_after:g} % was never written")
                changes.pop(0)
        if not changes:
            return tuple(done)
        if _is_its_own(changes[0], split):
            done += _finish(state, store, changes[0])
        else:
            done.append(_edited(state, store, changes[0], split))
        return tuple(done)


def _is_its_own(change: Change, split: Split) -> bool:
    return change.version == split.version and abs(change.percent_after - split.percent) < 0.005


def _finish(state: Path, store: Store, change: Change) -> list[str]:
    """The file holds it: let the record say so, and Envoy's word with it."""
    done = []
    if change.written_at is None:
        store.written(change.id)
        done.append(f"{change.decision} to {change.percent_after:g} % had been written")
    if change.confirmed_at is None:
        try:
            in_force = Admin(StackState.load(state).admin).route_version() == change.version
        except RolloutError:
            return done
        if in_force:
            store.confirmed(change.id)
            done.append(f"{change.decision} to {change.percent_after:g} % is in force")
    return done


def _edited(state: Path, store: Store, last: Change, split: Split) -> str:
    present = store.saved().state
    becomes: State | None = None
    reason = f"the route file was edited by hand: {split.percent:g} %"
    found = route_file(state)
    if present.active:
        at = found.stat().st_mtime
        becomes = pause(present, reason) if split.pruned else roll_back(present, reason, at)
    change = store.intend(
        actor="by hand",
        decision="edited",
        reason=reason,
        before=last.percent_after,
        after=split.percent,
        version=split.version,
        hashes=(last.hash_after, hashlib.sha256(found.read_bytes()).hexdigest()),
        state=becomes,
    )
    store.written(change)
    return reason
