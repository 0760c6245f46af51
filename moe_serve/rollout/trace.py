"""How each guard's interval went over time: for charts, kept apart from the record.

A database of its own, so that a chart never holds up a decision; losing it loses a picture. Old
points are thinned: every reading for an hour, one a minute for a month.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_serve.rollout.database import opened
from moe_serve.rollout.guards import Evidence, Unit

DATABASE: Final = "trace.sqlite3"
_FINE: Final = 3600.0
"""Seconds for which every point is kept."""
_COARSE: Final = 60.0
"""Seconds between points after that."""
_KEPT: Final = 31 * 86_400.0
_EVERY: Final = 100
"""Readings between two thinnings."""
_SCHEMA: Final = """
DROP TABLE IF EXISTS points;
CREATE TABLE IF NOT EXISTS intervals (
    at REAL NOT NULL,
    step INTEGER NOT NULL,
    guard TEXT NOT NULL,
    unit TEXT NOT NULL,
    lower REAL NOT NULL,
    upper REAL NOT NULL,
    margin REAL NOT NULL,
    PRIMARY KEY (guard, at)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One guard at one moment: pruned - original as an interval, and its margin."""

    at: float
    """Seconds since the epoch."""
    step: int
    guard: str
    unit: Unit
    lower: float
    upper: float
    margin: float


class Trace:
    """The points of one state directory."""

    def __init__(self, state: Path) -> None:
        """Created with the first point."""
        self._path = state / DATABASE
        self._added = 0

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with opened(
            self._path,
            timeout=0.5,
            # A point lost with the power is no loss.
            synchronous="OFF",
            fault="no points for charts",
            remedy="remove the file if this stays; decisions do not need it",
        ) as db:
            db.executescript(_SCHEMA)
            yield db

    def add(self, at: float, step: int, evidence: Iterable[Evidence]) -> None:
        """One point per guard.

        Raises:
            RolloutError: it can't be written.
        """
        rows = [(at, step, e.guard, e.unit, e.lower, e.upper, e.margin) for e in evidence]
        if not rows:
            return
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT OR REPLACE INTO intervals VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            if self._added % _EVERY == 0:
                _thin(db, at)
            db.execute("COMMIT")
        self._added += 1

    def points(self, since: float, most: int = 240) -> dict[str, list[Point]]:
        """Guard → its points since a moment, oldest first, about ``most`` evenly spread ones.

        Raises:
            RolloutError: it can't be read.
        """
        found: dict[str, list[Point]] = {}
        if not self._path.exists():
            return found
        with self._open() as db:
            span = db.execute(
                "SELECT max(at) - min(at) FROM intervals WHERE at >= ?", (since,)
            ).fetchone()[0]
            # The latest of each interval of time, so that the last point is always there.
            rows = db.execute(
                "SELECT max(at), step, guard, unit, lower, upper, margin FROM intervals"
                " WHERE at >= ?"
                " GROUP BY guard, CAST((at - ?) / ? AS INTEGER) ORDER BY 1",
                (since, since, max((span or 0.0) / most, 1e-3)),
            ).fetchall()
        for at, step, guard, unit, lower, upper, margin in rows:
            point = Point(
                at=at, step=step, guard=guard, unit=unit, lower=lower, upper=upper, margin=margin
            )
            found.setdefault(guard, []).append(point)
        return found


def _thin(db: sqlite3.Connection, now: float) -> None:
    old = now - _FINE
    db.execute("DELETE FROM intervals WHERE at < ?", (now - _KEPT,))
    db.execute(
        "DELETE FROM intervals WHERE at < ? AND (guard, at) NOT IN"
        " (SELECT guard, max(at) FROM intervals WHERE at < ?"
        " GROUP BY guard, CAST(at / ? AS INTEGER))",
        (old, old, _COARSE),
    )
