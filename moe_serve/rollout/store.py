"""SQLite: what was intended and what took effect. The route file is the truth about traffic."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_serve.errors import RolloutError

DATABASE: Final = "rollout.sqlite3"
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS changes (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    actor TEXT NOT NULL,
    decision TEXT NOT NULL,
    reason TEXT NOT NULL,
    percent_before REAL,
    percent_after REAL NOT NULL,
    version TEXT,
    confirmed_at REAL
) STRICT;
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change of the split."""

    id: int
    at: float
    """Seconds since the epoch when it was intended."""
    actor: str
    decision: str
    """``set`` or ``rollback``, ``promote``, ``edited``."""
    reason: str
    percent_before: float | None
    percent_after: float
    version: str | None
    """Of the route file, once written."""
    confirmed_at: float | None
    """When Envoy said it was in force."""

    def to_json(self) -> dict[str, Any]:
        """For API and CLI."""
        return {name: getattr(self, name) for name in self.__slots__}


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
            db.executescript(_SCHEMA)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = None
        try:
            db = sqlite3.connect(self._path, timeout=self._timeout)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            with db:
                yield db
        except sqlite3.Error as exc:
            raise RolloutError(
                f"the record can't be used ({exc})",
                where=str(self._path),
                remedy="another process may hold it, or the disk is full",
            ) from exc
        finally:
            if db is not None:
                db.close()

    def intend(
        self, *, actor: str, decision: str, reason: str, before: float | None, after: float
    ) -> int:
        """Record what is about to happen; return its id."""
        with self._open() as db:
            row = db.execute(
                "INSERT INTO changes (at, actor, decision, reason, percent_before, percent_after)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (time.time(), actor, decision, reason, before, after),
            )
            return int(row.lastrowid or 0)

    def written(self, change: int, version: str) -> None:
        """The route file holds it."""
        with self._open() as db:
            db.execute("UPDATE changes SET version = ? WHERE id = ?", (version, change))

    def confirmed(self, version: str) -> None:
        """Envoy has it in force."""
        with self._open() as db:
            db.execute(
                "UPDATE changes SET confirmed_at = ? WHERE version = ? AND confirmed_at IS NULL",
                (time.time(), version),
            )

    def history(self, limit: int = 100) -> list[Change]:
        """The latest changes, newest first."""
        columns = ", ".join(Change.__slots__)
        with self._open() as db:
            rows = db.execute(
                f"SELECT {columns} FROM changes ORDER BY id DESC LIMIT ?",  # noqa: S608 - constant
                (limit,),
            ).fetchall()
        return [Change(**dict(zip(Change.__slots__, row, strict=True))) for row in rows]
