"""Opening the state directory's SQLite files, its errors translated."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from moe_serve.errors import RolloutError


@contextmanager
def opened(
    path: Path, *, timeout: float, synchronous: Literal["FULL", "OFF"], fault: str, remedy: str
) -> Iterator[sqlite3.Connection]:
    """A connection in autocommit and write-ahead mode; closed at the end.

    Args:
        path: of the file; made where there is none.
        timeout: seconds to wait for another writer.
        synchronous: whether each commit reaches the disk.
        fault: what does not work without it.
        remedy: what to do then.

    Raises:
        RolloutError: SQLite can't use it.
    """
    db = None
    try:
        # For its owner alone: a policy on record may hold a webhook's address.
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        db = sqlite3.connect(path, timeout=timeout, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA synchronous={synchronous}")
        yield db
    except (sqlite3.Error, OSError) as exc:
        raise RolloutError(f"{fault} ({exc})", where=str(path), remedy=remedy) from exc
    finally:
        if db is not None:
            db.close()
