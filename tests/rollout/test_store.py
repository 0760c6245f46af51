"""The record: transactions, lease, chain."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_serve.errors import Overtaken, RolloutError
from moe_serve.rollout.state import State, pause
from moe_serve.rollout.store import DATABASE, Store

CANARY = State(phase="canary", step=1, began=5.0)


COPY = (
    "INSERT INTO changes SELECT 9, at, actor, decision, reason, percent_before, percent_after, "
    "version, hash_before, hash_after, evidence, state_before, 1, 1, NULL FROM changes"
)


def intend(store: Store, **changes: Any) -> int:
    """A change with most fields filled in."""
    fields: dict[str, Any] = {
        "actor": "a",
        "decision": "set",
        "reason": "r",
        "before": 0.0,
        "after": 5.0,
        "version": "v",
    }
    return store.intend(**(fields | changes))


def alter(state: Path, statement: str) -> None:
    """Behind the store's back."""
    with sqlite3.connect(state / DATABASE) as db:
        db.execute(statement)
    db.close()


def test_it_is_written_through(tmp_path: Path) -> None:
    """WAL, and a commit waits for the disk."""
    store = Store(tmp_path)
    with store._open() as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_it_is_for_its_owner_alone(tmp_path: Path) -> None:
    """A policy on record may name a webhook whose address is a secret."""
    Store(tmp_path).lease("someone", 1.0)
    assert (tmp_path / DATABASE).stat().st_mode & 0o777 == 0o600


def test_a_pause_outlives_a_change_that_was_given_up(tmp_path: Path) -> None:
    """A controller died between intent and route file; a person paused before the next began.

    What was intended is given up, and the rollout stays paused, at the step before.
    """
    store = Store(tmp_path)
    store.note("policy", {}, state=CANARY, policy="{}")
    onwards = replace(CANARY, step=2)
    change = intend(store, decision="advance", state=onwards)
    store.note("paused", {}, state=pause(onwards, "lunch (ada)"))
    store.abandoned(change)
    assert store.saved().state == pause(CANARY, "lunch (ada)")
    change = intend(store, state=pause(CANARY, "set to 30 % by hand"))
    store.abandoned(change)
    assert store.saved().state == pause(CANARY, "lunch (ada)")


def test_a_state_is_committed_with_its_intent(tmp_path: Path) -> None:
    """And the state before it comes back with its abandonment."""
    store = Store(tmp_path)
    change = intend(store, state=CANARY)
    assert store.saved().state == CANARY
    store.abandoned(change)
    assert store.saved().state == State()
    assert store.saved().revision == 2


def test_an_old_revision_is_refused_whole(tmp_path: Path) -> None:
    """A person acted in between: nothing of the controller's change remains."""
    store = Store(tmp_path)
    read = store.saved().revision
    store.note("paused", {"actor": "person"}, state=CANARY)
    with pytest.raises(Overtaken, match="someone else"):
        intend(store, state=State(), revision=read)
    assert store.history() == []
    assert store.saved().state == CANARY
    assert store.verify().problems == ()


def test_a_second_controller_is_refused(tmp_path: Path) -> None:
    """Until the first gives the lease up or lets it run out."""
    store = Store(tmp_path)
    store.lease("one", 60)
    store.lease("one", 60)
    with pytest.raises(Overtaken, match="another controller \\(one\\)"):
        Store(tmp_path).lease("two", 60)
    with pytest.raises(Overtaken, match="lease"):
        intend(store, holder="two")
    store.release("one")
    store.lease("two", -1)
    assert store.lease_holder() is None
    store.lease("three", 60)
    assert store.lease_holder() == "three"


def test_an_untouched_record_verifies(tmp_path: Path) -> None:
    """Two changes and a note: 2 intents, 1 written, 1 confirmed, 1 abandoned, 1 note."""
    store = Store(tmp_path)
    first = intend(store, state=CANARY, evidence={"ü": 1.5})
    store.written(first)
    store.confirmed(first)
    store.abandoned(intend(store, version="w"))
    store.note("paused", {"why": "lunch"})
    found = store.verify()
    assert (found.entries, found.problems) == (6, ())
    assert len(found.head) == 64


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE audit SET body = replace(body, '5.0', '1.0') WHERE id = 1", "entry 1"),
        ("DELETE FROM audit WHERE id = 2", "entry 2 is missing"),
        ("UPDATE changes SET percent_after = 1.0", "percent_after differs"),
        ("UPDATE changes SET actor = 'nobody'", "actor differs"),
        ("DELETE FROM changes", "change 1 was removed"),
        ("UPDATE changes SET confirmed_at = 1.0", "confirmed_at differs"),
        (COPY, "change 9 is not in the log"),
        ("INSERT INTO audit VALUES (4, 'note', '{}', 'x')", "entry 4"),
    ],
)
def test_whatever_is_altered_shows(statement: str, says: str, tmp_path: Path) -> None:
    """In the log or in the table."""
    store = Store(tmp_path)
    change = intend(store)
    store.written(change)
    store.note("paused", {"why": "lunch"})
    assert store.verify().problems == ()
    alter(tmp_path, statement)
    assert any(says in problem for problem in store.verify().problems)


def test_a_record_of_another_layout_is_refused(tmp_path: Path) -> None:
    """With what to do."""
    alter(tmp_path, "CREATE TABLE changes (id INTEGER)")
    with pytest.raises(RolloutError, match="move it away"):
        Store(tmp_path)


def test_a_damaged_record_is_an_error_of_ours(tmp_path: Path) -> None:
    """Not SQLite's."""
    (tmp_path / DATABASE).write_bytes(b"no database" * 100)
    with pytest.raises(RolloutError, match="can't be used"):
        Store(tmp_path)
