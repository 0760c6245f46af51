"""Changing the split: intent on record, then the route file, then Envoy's word that it holds.

Needs nothing but the state directory: the control process may be dead, the record locked. Then
the traffic still moves and the gap in the record is said.
"""

from __future__ import annotations

import getpass
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from moe_serve.errors import RolloutError
from moe_serve.rollout.store import Store
from moe_serve.serving.envoy import Admin
from moe_serve.serving.routes import read_split, write_split
from moe_serve.serving.state import StackState

Decision = Literal["set", "promote", "rollback"]
DECISIONS: Final[tuple[Decision, ...]] = ("set", "promote", "rollback")


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """A change of the split that is on disk."""

    percent: float
    before: float | None
    version: str
    written_at: float
    """Seconds since the epoch when the file was in place."""
    effective_seconds: float | None
    """From the write until Envoy had it in force; ``None`` where Envoy could not be asked."""
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "pruned_percent": self.percent,
            "before_percent": self.before,
            "version": self.version,
            "written_at": self.written_at,
            "effective_seconds": self.effective_seconds,
            "warnings": list(self.warnings),
        }


def move(state: Path, percent: float, *, decision: Decision, reason: str, actor: str = "") -> Moved:
    """Give the pruned variant ``percent`` of the traffic.

    Raises:
        RolloutError: no stack was ever here, or the share is out of range.
        OutputError: the route file can't be written.
    """
    stack = StackState.load(state)
    if not 0.0 <= percent <= 100.0:
        raise RolloutError(f"{percent:g} is not a share between 0 and 100")
    warnings: list[str] = []
    before = _present(state, warnings)
    store, change = None, 0
    try:
        store = Store(state)
        change = store.intend(
            actor=actor or getpass.getuser(),
            decision=decision,
            reason=reason,
            before=before,
            after=percent,
        )
    except RolloutError as exc:
        warnings.append(f"not recorded: {exc}")
    split = write_split(state, percent)
    written_at = time.time()
    effective = None
    try:
        effective = Admin(stack.admin).confirm(split.version)
    except RolloutError as exc:
        warnings.append(f"written, but not confirmed: {exc}")
    if store is not None and change:
        try:
            store.written(change, split.version)
            if effective is not None:
                store.confirmed(split.version)
        except RolloutError as exc:
            warnings.append(f"in force, but its confirmation is not recorded: {exc}")
    return Moved(
        percent=split.percent,
        before=before,
        version=split.version,
        written_at=written_at,
        effective_seconds=effective,
        warnings=tuple(warnings),
    )


def _present(state: Path, warnings: list[str]) -> float | None:
    try:
        return read_split(state).percent
    except RolloutError as exc:
        warnings.append(f"the split before is unknown: {exc}")
        return None


def status(state: Path) -> dict[str, Any]:
    """Where traffic goes now, what runs, and the last changes.

    Raises:
        RolloutError: no stack was ever here.
    """
    stack = StackState.load(state)
    split = read_split(state)
    admin = Admin(stack.admin)
    in_force: bool | None = None
    try:
        in_force = admin.route_version() == split.version
    except RolloutError:
        in_force = None
    changes = Store(state).history(limit=1)
    edited = bool(changes) and changes[0].version not in (split.version, None)
    return {
        "state": _state_name(split.percent),
        "pruned_percent": split.percent,
        "version": split.version,
        "in_force": in_force,
        "edited_by_hand": edited,
        "endpoint": stack.endpoint,
        "control": stack.control,
        "engines": {name: engine.url for name, engine in stack.engines.items()},
        "last_change": changes[0].to_json() if changes else None,
    }


def _state_name(percent: float) -> str:
    if percent == 0.0:
        return "idle"
    return "promoted" if percent == 100.0 else "canary"
