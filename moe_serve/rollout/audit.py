"""An append-only log in which every entry carries the hash of all before it.

A line that is altered, removed from the middle or put in later breaks the chain. What no chain
shows by itself is a missing end: keep the last hash that ``history --verify`` prints elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS audit (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    hash TEXT NOT NULL
) STRICT;
"""
_FIRST: Final = "0" * 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """Outcome of a check."""

    entries: int
    head: str
    """The last hash."""
    problems: tuple[str, ...]


def append(db: sqlite3.Connection, kind: str, body: Mapping[str, Any]) -> None:
    """Add an entry within the caller's transaction."""
    row = db.execute("SELECT id, hash FROM audit ORDER BY id DESC LIMIT 1").fetchone()
    number, previous = (int(row[0]), str(row[1])) if row else (0, _FIRST)
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    db.execute(
        "INSERT INTO audit VALUES (?, ?, ?, ?)",
        (number + 1, kind, text, _hash(previous, kind, text)),
    )


def verify(db: sqlite3.Connection) -> Verified:
    """Recompute every hash; compare the table of changes with what the log says of them."""
    previous, problems, changes = _FIRST, [], {}
    expected = 0
    for number, kind, text, found in db.execute(
        "SELECT id, kind, body, hash FROM audit ORDER BY id"
    ):
        expected += 1
        if number != expected:
            problems.append(f"entry {expected} is missing")
            expected = number
        if _hash(previous, kind, text) != found:
            problems.append(f"entry {number} ({kind}) does not follow from those before it")
        previous = found
        body = json.loads(text)
        if kind == "intended":
            changes[body.pop("change")] = body
        elif kind in ("written", "confirmed", "abandoned"):
            changes.setdefault(body["change"], {}).setdefault(f"{kind}_at", body["at"])
    db.row_factory = sqlite3.Row
    rows = {row["id"]: dict(row) for row in db.execute("SELECT * FROM changes")}
    problems += [f"change {n} is not in the log" for n in sorted(rows.keys() - changes.keys())]
    problems += [f"change {n} was removed" for n in sorted(changes.keys() - rows.keys())]
    problems += [
        f"change {number}: {name} differs from the log"
        for number, body in sorted(changes.items())
        for name, value in rows.get(number, {}).items()
        if name != "id" and body.get(name) != value
    ]
    return Verified(entries=expected, head=previous, problems=tuple(problems))


def _hash(previous: str, kind: str, text: str) -> str:
    return hashlib.sha256(f"{previous}\n{kind}\n{text}".encode()).hexdigest()
