"""SQLite: what was intended and what took effect. The route file is the truth about traffic.

A change goes through three commits: intended (with its evidence, before the route file is
touched), written, confirmed by Envoy. Whatever process dies between them, what is on disk says how
far it got (:mod:`moe_serve.rollout.recovery`).
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

from moe_serve.errors import Overtaken, RolloutError
from moe_serve.rollout import audit, lease
from moe_serve.rollout.database import opened
from moe_serve.rollout.record import Change, Entry, Saved
from moe_serve.rollout.state import State, pause

DATABASE: Final = "rollout.sqlite3"
_VERSION: Final = 3
_ENDLESS: Final = 2**62
_SCHEMA: Final = (
    """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS changes (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    actor TEXT NOT NULL,
    decision TEXT NOT NULL,
    reason TEXT NOT NULL,
    percent_before REAL,
    percent_after REAL NOT NULL,
    version TEXT NOT NULL,
    hash_before TEXT,
    hash_after TEXT,
    evidence TEXT NOT NULL,
    state_before TEXT NOT NULL,
    written_at REAL,
    confirmed_at REAL,
    abandoned_at REAL
) STRICT;
CREATE TABLE IF NOT EXISTS rollout (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    revision INTEGER NOT NULL,
    state TEXT NOT NULL,
    policy TEXT,
    seen TEXT NOT NULL
) STRICT;
INSERT OR IGNORE INTO rollout VALUES (1, 0, '{}', NULL, '{}');
"""
    + lease.SCHEMA
    + audit.SCHEMA
    + f"PRAGMA user_version = {_VERSION}; COMMIT;"
)


class Store:
    """The database of one state directory; several processes may use it."""

    def __init__(self, state: Path, timeout: float = 0.5) -> None:
        """Open or create it.

        Args:
            state: the stack's state directory.
            timeout: seconds to wait for another writer.
        """
        self._path = state / DATABASE
        self._timeout = timeout
        with self._open() as db:
            found = int(db.execute("PRAGMA user_version").fetchone()[0])
            tables = int(db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
            if found != _VERSION and tables:
                raise RolloutError(
                    f"is a record of layout {found}, this program's is {_VERSION}",
                    where=str(self._path),
                    remedy="move it away; a new one is begun",
                )
            if not tables:
                db.executescript(_SCHEMA)

    def _open(self) -> AbstractContextManager[sqlite3.Connection]:
        return opened(
            self._path,
            timeout=self._timeout,
            synchronous="FULL",
            fault="the record can't be used",
            remedy="another process may hold it, or the disk is full",
        )

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is on disk, or none."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def intend(
        self,
        *,
        actor: str,
        decision: str,
        reason: str,
        before: float | None,
        after: float,
        version: str,
        hashes: tuple[str | None, str | None] = (None, None),
        evidence: Mapping[str, Any] | None = None,
        state: State | None = None,
        revision: int | None = None,
        holder: str | None = None,
    ) -> int:
        """Record what is about to happen, and the state it leads to; return its id.

        Args:
            actor: who or what.
            decision: one of :class:`Change`'s.
            reason: for a person.
            before: percent of the traffic now.
            after: and then.
            version: of the route file that will say so.
            hashes: of the route file before and after.
            evidence: what it rests on.
            state: of the rollout from now on; ``None`` keeps it.
            revision: refuse when the state has changed since it was read.
            holder: refuse when the lease is not this one's.

        Raises:
            Overtaken: someone else acted in between, or holds the lease.
        """
        with self._writing() as db:
            self._check(db, revision, holder)
            present = db.execute("SELECT state FROM rollout").fetchone()[0]
            row = {
                "at": time.time(),
                "actor": actor,
                "decision": decision,
                "reason": reason,
                "percent_before": before,
                "percent_after": after,
                "version": version,
                "hash_before": hashes[0],
                "hash_after": hashes[1],
                "evidence": _json(evidence or {}),
                "state_before": present,
            }
            names, marks = ", ".join(row), ", ".join("?" * len(row))
            done = db.execute(
                f"INSERT INTO changes ({names}) VALUES ({marks})",  # noqa: S608 - our own names
                tuple(row.values()),
            )
            change = int(done.lastrowid or 0)
            if state is not None:
                self._put(db, state)
            audit.append(db, "intended", {"change": change, **row})
            return change

    def _check(self, db: sqlite3.Connection, revision: int | None, holder: str | None) -> None:
        if revision is not None:
            now = int(db.execute("SELECT revision FROM rollout").fetchone()[0])
            if now != revision:
                raise Overtaken(
                    "the rollout was changed by someone else in between",
                    where="rollout",
                    remedy="look at moe-serve rollout status, then decide again",
                )
        if holder is not None:
            lease.check(db, holder)

    @staticmethod
    def _put(db: sqlite3.Connection, state: State) -> None:
        db.execute(
            "UPDATE rollout SET revision = revision + 1, state = ?", (_json(state.to_json()),)
        )

    def written(self, change: int) -> None:
        """The route file holds it."""
        self._mark("written", change)

    def confirmed(self, change: int) -> None:
        """Envoy has it in force."""
        self._mark("confirmed", change)

    def abandoned(self, change: int) -> None:
        """It never got into the route file; the state before it holds again."""
        with self._writing() as db:
            self._stamp(db, "abandoned", change)
            present, before = (
                State.from_json(json.loads(text))
                for text in db.execute(
                    "SELECT state, state_before FROM rollout, changes WHERE changes.id = ?",
                    (change,),
                ).fetchone()
            )
            if present.phase == "paused" and self._paused_since(db, change):
                before = pause(before, present.reason)
            self._put(db, before)

    @staticmethod
    def _paused_since(db: sqlite3.Connection, change: int) -> bool:
        """Whether someone paused after the change was intended; that stays."""
        found = db.execute(
            "SELECT count(*) FROM audit WHERE kind = 'paused' AND id > (SELECT id FROM audit WHERE"
            " kind = 'intended' AND json_extract(body, '$.change') = ?)",
            (change,),
        ).fetchone()
        return bool(found[0])

    def _mark(self, what: str, change: int) -> None:
        with self._writing() as db:
            self._stamp(db, what, change)

    @staticmethod
    def _stamp(db: sqlite3.Connection, what: str, change: int) -> None:
        at = time.time()
        db.execute(
            f"UPDATE changes SET {what}_at = ? WHERE id = ? AND {what}_at IS NULL",  # noqa: S608 - one of three words
            (at, change),
        )
        audit.append(db, what, {"change": change, "at": at})

    def note(
        self,
        kind: str,
        body: Mapping[str, Any],
        *,
        state: State | None = None,
        revision: int | None = None,
        policy: str | None = None,
    ) -> None:
        """Record what moves no traffic: pauses, resumes, what a dry run would have done.

        Raises:
            Overtaken: ``revision`` is not the present one.
        """
        with self._writing() as db:
            self._check(db, revision, None)
            if state is not None:
                self._put(db, state)
            if policy is not None:
                # A new rollout has seen nothing yet.
                db.execute("UPDATE rollout SET policy = ?, seen = '{}'", (policy,))
            audit.append(db, kind, {"at": time.time(), **body})

    def saved(self) -> Saved:
        """Where the rollout stands."""
        with self._open() as db:
            row = db.execute("SELECT revision, state, policy, seen FROM rollout").fetchone()
        return Saved(
            revision=int(row[0]),
            state=State.from_json(json.loads(row[1])),
            policy=row[2],
            seen=json.loads(row[3]),
        )

    def save_seen(self, seen: Mapping[str, Any]) -> None:
        """Keep the evidence over a restart of the controller; not part of the audit."""
        with self._writing() as db:
            db.execute("UPDATE rollout SET seen = ?", (_json(seen),))

    def lease(self, holder: str, seconds: float) -> None:
        """Take or renew the right to act.

        Raises:
            Overtaken: another controller has it.
        """
        with self._writing() as db:
            lease.take(db, holder, seconds, where=str(self._path))

    def release(self, holder: str) -> None:
        """Give the lease up."""
        with self._writing() as db:
            lease.release(db, holder)

    def lease_holder(self) -> str | None:
        """Who may act now."""
        with self._open() as db:
            return lease.holder(db)

    def history(self, limit: int = 100, before: int | None = None) -> list[Change]:
        """The latest changes, newest first; with ``before`` only those of a smaller id."""
        columns = ", ".join(Change.__slots__)
        with self._open() as db:
            rows = db.execute(
                f"SELECT {columns} FROM changes WHERE id < ? ORDER BY id DESC LIMIT ?",  # noqa: S608 - constant
                (_ENDLESS if before is None else before, limit),
            ).fetchall()
        return [Change.of(row) for row in rows]

    def began(self) -> float | None:
        """When the latest rollout by policy began, seconds since the epoch."""
        with self._open() as db:
            found = db.execute("SELECT max(at) FROM changes WHERE decision = 'start'").fetchone()[0]
        return None if found is None else float(found)

    def tally(self) -> dict[tuple[str, str], int]:
        """(decision, actor) → changes on record."""
        with self._open() as db:
            rows = db.execute("SELECT decision, actor, count(*) FROM changes GROUP BY 1, 2")
            return {(decision, actor): count for decision, actor, count in rows}

    def log(
        self, limit: int = 50, *, after: int | None = None, before: int | None = None
    ) -> list[Entry]:
        """Lines of the audit log, newest first; with ``after`` those since, oldest first."""
        columns = ", ".join(f"c.{name}" for name in Change.__slots__)
        order = "a.id DESC" if after is None else "a.id"
        with self._open() as db:
            rows = db.execute(
                f"SELECT a.id, a.kind, a.body, {columns} FROM audit a LEFT JOIN changes c"  # noqa: S608 - constant
                " ON a.kind = 'intended' AND c.id = json_extract(a.body, '$.change')"
                f" WHERE a.id > ? AND a.id < ? ORDER BY {order} LIMIT ?",
                (after or 0, _ENDLESS if before is None else before, limit),
            ).fetchall()
        return [
            Entry(
                id=row[0],
                kind=row[1],
                body=json.loads(row[2]),
                change=Change.of(row[3:]) if row[3] is not None else None,
            )
            for row in rows
        ]

    def verify(self) -> audit.Verified:
        """Recompute the chain of the audit log and compare it with the changes."""
        with self._open() as db:
            return audit.verify(db)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
