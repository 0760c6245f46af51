"""An output directory that appears whole or not at all, and is resumed after a kill."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from moe_serve.errors import OutputError
from moe_serve.files import write_json, writing

_SUFFIX: Final = ".partial"
_JOURNAL: Final = "journal.json"
_LOCK: Final = "lock"
_TRASH: Final = "trash"
WORK: Final = "work"
"""Sub-folder of the staging directory for what the finished output does not keep."""


class Staging:
    """An unfinished output: a folder beside the target, and a journal of what is done.

    A step is recorded in the journal after its bytes are on disk, so a process killed at any
    moment leaves a folder from which the same command continues.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        """Open ``path``, continuing only what an equal ``fingerprint`` began."""
        self.path = path
        self.work = path / WORK
        with writing(path):
            self.work.mkdir(parents=True, exist_ok=True)
        journal = self.work / _JOURNAL
        self._journal = journal
        state: dict[str, Any] = {"run": dict(fingerprint), "done": {}}
        if journal.exists():
            try:
                found = json.loads(journal.read_text(encoding="utf-8"))
                previous, done = found["run"], dict(found["done"])
            except (ValueError, KeyError, TypeError) as exc:
                raise OutputError(
                    "its journal is damaged",
                    where=str(journal),
                    remedy=f"delete {path} and run the command again",
                ) from exc
            if previous != state["run"]:
                keys = sorted(
                    k
                    for k in previous.keys() | state["run"].keys()
                    if previous.get(k) != state["run"].get(k)
                )
                raise OutputError(
                    f"an unfinished run with other settings is here (differs in {', '.join(keys)})",
                    where=str(path),
                    remedy="repeat that run's command to finish it, or delete the folder",
                )
            state["done"] = done
        self._state = state
        if not journal.exists():
            write_json(journal, state)

    @property
    def resumed(self) -> bool:
        """Whether an earlier process left finished steps."""
        return bool(self._state["done"])

    def done(self, step: str) -> Any | None:
        """What was recorded for a finished step; ``None`` when it is still to do."""
        return self._state["done"].get(step)

    def finish(self, step: str, record: Any = True) -> None:
        """Record a step whose bytes are on disk."""
        self._state["done"][step] = record
        write_json(self._journal, self._state)


@contextmanager
def staged(target: Path, fingerprint: Mapping[str, Any]) -> Iterator[Staging]:
    """Build ``target`` in ``target.partial``; rename it when the block ends without an error.

    Args:
        target: the directory to make; must not exist, or be empty.
        fingerprint: everything that decides the output's bytes; compared on resume.

    Raises:
        OutputError: the target exists, another process is writing it, an unfinished run with
            other settings is in the way, or the disk is full.
    """
    target = target.absolute()
    partial = target.with_name(target.name + _SUFFIX)
    trash = target.with_name(f".{target.name}.{_TRASH}")
    try:
        _refuse_existing(target)
    except OutputError:
        if not partial.exists():
            shutil.rmtree(trash, ignore_errors=True)
        raise
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
    # The lock lies beside the folder, not in it: the folder is renamed while it is held.
    lock_path = target.with_name(f".{target.name}.{_LOCK}")
    with writing(lock_path), lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                "another process is writing this output",
                where=str(partial),
                remedy="wait for it, or choose another output",
            ) from None
        try:
            _refuse_existing(target)  # Whoever held the lock until now may have finished it.
        except OutputError:
            partial.rmdir()
            raise
        with writing(partial):
            _settle(partial, trash)
        staging = Staging(partial, fingerprint)
        yield staging
        with writing(target):
            # Deleting takes long and may be cut short: what the journal tells has to hold until the
            # output has its name.
            staging.work.replace(trash)
            if target.is_dir():
                target.rmdir()
            partial.replace(target)
            shutil.rmtree(trash, ignore_errors=True)
            lock_path.unlink(missing_ok=True)


def _settle(partial: Path, trash: Path) -> None:
    """What a process left that was killed at its very end: work that is still asked for goes back.

    That is the work of an output which lacks no more than its name; one that is only beginning has
    nothing in it.
    """
    if not trash.exists():
        return
    if any(partial.iterdir()) and not (partial / WORK).exists():
        trash.replace(partial / WORK)
    else:
        shutil.rmtree(trash)


def _refuse_existing(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise OutputError(
            "exists already", where=str(target), remedy="choose another output or remove it first"
        )


def free_bytes(path: Path) -> int:
    """Free space where ``path`` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(
    path: Path, needed: int, *, remedy: str = "free some space or choose another output"
) -> None:
    """Refuse early.

    Raises:
        OutputError: less than ``needed`` bytes are free.
    """
    free = free_bytes(path)
    if free < needed:
        raise OutputError(
            f"needs {needed / 1e9:.2f} GB on disk, {free / 1e9:.2f} GB are free",
            where=str(path),
            remedy=remedy,
        )
