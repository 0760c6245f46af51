"""Locks in the state directory.

The kernel holds them for an open file and frees them with the process, however it ends: none is
ever left behind. Children don't inherit them; Python opens files that way.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from moe_serve.errors import ServingError
from moe_serve.files import writing

UP: Final = "up.lock"
"""Held by ``up`` as long as it runs; its content is the process id."""
KEYS: Final = "keys.lock"
_BLINK: Final = 1.0
"""Seconds that whoever only looks, at most, has it."""
_PATIENCE: Final = 30.0


def hold_stack(state: Path) -> IO[str]:
    """Be the one ``up`` of a state directory, until the file is closed.

    Raises:
        ServingError: there is one already; with its process id.
        OutputError: the file can't be written.
    """
    path = state / UP
    with writing(path):
        file = path.open("a+")
        if not taken(file, fcntl.LOCK_EX, _BLINK):
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise ServingError(
                f"another moe-serve up (process {holder or 'unknown'}) runs with this directory",
                where=str(state),
                remedy="stop it first, or give another --state",
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    return file


def is_up(state: Path) -> bool:
    """Whether an ``up`` runs with this state directory."""
    try:
        with (state / UP).open() as file:
            return not taken(file, fcntl.LOCK_SH, 0.0)
    except FileNotFoundError:
        return False
    except OSError:
        # It can't be told, so nobody should rely on there being none.
        return True


@contextmanager
def keys_lock(state: Path) -> Iterator[None]:
    """One at a time reads the keys to write what follows from them.

    Raises:
        ServingError: another process does not let go of it.
        OutputError: the file can't be written.
    """
    path = state / KEYS
    with writing(path):
        state.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        with writing(path):
            ours = taken(file, fcntl.LOCK_EX, _PATIENCE)
        if not ours:
            raise ServingError(
                f"another process has been changing keys for {_PATIENCE:g} s",
                where=str(path),
                remedy="end the moe-serve keys that hangs, then try again",
            )
        yield


def taken(file: IO[Any], kind: int, seconds: float) -> bool:
    """Whether the lock could be had within these seconds.

    Raises:
        OSError: the file system has none.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.01)
        else:
            return True
