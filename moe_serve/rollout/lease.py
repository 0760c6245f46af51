"""Who may act: one controller at a time, for as long as it says so again and again."""

from __future__ import annotations

import sqlite3
import time
from typing import Final

from moe_serve.errors import Overtaken

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS lease (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    holder TEXT NOT NULL,
    expires REAL NOT NULL
) STRICT;
"""


def take(db: sqlite3.Connection, holder: str, seconds: float, *, where: str) -> None:
    """Take or renew it, within the caller's transaction.

    Raises:
        Overtaken: another controller has it.
    """
    row = db.execute("SELECT holder, expires FROM lease").fetchone()
    now = time.time()
    # A lease that ends further ahead than any is given was left by a clock gone wrong.
    if row is not None and row[0] != holder and now < row[1] <= now + 10.0 * seconds:
        raise Overtaken(
            f"another controller ({row[0]}) drives this stack",
            where=where,
            remedy=f"stop it, or wait {row[1] - now:.0f} s if it is gone",
        )
    db.execute("INSERT OR REPLACE INTO lease VALUES (1, ?, ?)", (holder, now + seconds))


def check(db: sqlite3.Connection, holder: str) -> None:
    """See that it still is this one's.

    Raises:
        Overtaken: another controller has it.
    """
    row = db.execute("SELECT holder FROM lease").fetchone()
    if row is None or row[0] != holder:
        raise Overtaken(
            "another controller has taken the lease",
            where="rollout",
            remedy="run one controller for a state directory",
        )


def release(db: sqlite3.Connection, holder: str) -> None:
    """Give it up, if it is this one's."""
    db.execute("DELETE FROM lease WHERE holder = ?", (holder,))


def holder(db: sqlite3.Connection) -> str | None:
    """Who has it now."""
    row = db.execute("SELECT holder, expires FROM lease").fetchone()
    return str(row[0]) if row is not None and time.time() < row[1] else None
