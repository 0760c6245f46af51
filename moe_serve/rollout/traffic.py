"""Changing the split: intent on record, then the routes, then the proxy's word that they hold.

Needs nothing but the state directory: the control process may be dead, the record locked, the disk
full. Then the traffic still moves and the gap in the record is said.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from moe_serve.errors import OutputError, Overtaken, RolloutError
from moe_serve.rollout.person import printable, whoami
from moe_serve.rollout.state import State, pause, roll_back
from moe_serve.rollout.store import Store
from moe_serve.serving.locks import taken
from moe_serve.serving.routes import STICKY, TOTAL, Split, new_split
from moe_serve.serving.routing import Routing, routing_of
from moe_serve.serving.sharing import wake_original
from moe_serve.serving.state import StackState

Decision = Literal["set", "start", "advance", "resume", "promote", "rollback"]
DECISIONS: Final[tuple[Decision, ...]] = (
    "set",
    "start",
    "advance",
    "resume",
    "promote",
    "rollback",
)
LOCK: Final = "routes.lock"
_PATIENCE: Final = 0.5
"""Seconds to wait for another who moves traffic; a person does not wait longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """A change of the split that is on disk."""

    percent: float
    before: float | None
    version: str
    written_at: float
    """Seconds since the epoch when the routes were written."""
    effective_seconds: float | None
    """From the write until it was in force; ``None`` where nobody could be asked."""
    warnings: tuple[str, ...] = ()
    recorded: bool = True
    """Whether its intent is in the record."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Basis:
    """What a controller's move rests on; it is refused when that no longer holds."""

    state: State
    """Of the rollout from now on."""
    revision: int
    holder: str | None = None
    """Of the lease."""
    evidence: Mapping[str, Any] | None = None


def move(
    state: Path,
    percent: float,
    *,
    decision: Decision,
    reason: str,
    actor: str = "",
    shadow: float = 0.0,
    sticky: tuple[str, ...] | None = None,
    basis: Basis | None = None,
) -> Moved:
    """Give the pruned variant ``percent`` of the traffic.

    Args:
        state: the stack's state directory.
        percent: 0 to 100.
        decision: what to call it in the record.
        reason: for a person.
        actor: who; by default the user.
        shadow: percent to copy.
        sticky: as the routes have it; ``None`` keeps what is there.
        basis: of a controller; a person's move needs none and always wins.

    Raises:
        RolloutError: no stack was ever here, the share is out of range, or, on a shared GPU, the
            original did not wake; nothing was moved.
        Overtaken: the basis no longer holds; nothing was moved.
        OutputError: the routes can't be written.
    """
    stack, routing = StackState.load(state), routing_of(state)
    warnings: list[str] = []
    new_split(percent, shadow=shadow)
    with routes_lock(state, warnings, must=basis is not None):
        present = _present(routing, warnings)
        kept = present.sticky if present is not None else STICKY
        split = new_split(
            percent,
            shadow=shadow,
            sticky=kept if sticky is None else sticky,
            shares_gpu=stack.shares_gpu,
        )
        _wake(stack, split, warnings)
        before = None if present is None else present.percent
        store, change = None, 0
        who, reason = actor or whoami(), printable(reason)
        try:
            store = Store(state)
            change = _intend(store, routing, split, before, decision, reason, who, basis)
        except Overtaken:
            raise
        except RolloutError as exc:
            # A rollback happens in any case; a step forward needs its record.
            if basis is not None and decision != "rollback":
                raise
            warnings.append(f"not recorded: {exc}")
        except Exception as exc:
            if decision != "rollback":
                raise
            warnings.append(f"not recorded: {type(exc).__name__}: {exc}")
        try:
            # A rollback is never too late.
            steps = basis is not None and decision != "rollback"
            routing.put(split, over=present if steps else None)
        except OutputError as exc:
            if decision != "rollback":
                raise
            split, change = routing.fall_back(exc), 0
            warnings.append(f"the spare routes are in force: {exc}")
        written_at, began = time.time(), time.monotonic()
        try:
            # It may have fallen asleep in between.
            _wake(stack, split, warnings)
        except RolloutError as exc:
            warnings.append(f"traffic has moved, but {exc}")
        effective = None
        try:
            routing.confirm(split.version)
            effective = time.monotonic() - began
        except RolloutError as exc:
            warnings.append(f"written, but not confirmed: {exc}")
        if store is not None and change:
            _record(warnings, store, change, in_force=effective is not None)
    return Moved(
        percent=split.percent,
        before=before,
        version=split.version,
        written_at=written_at,
        effective_seconds=effective,
        warnings=tuple(warnings),
        recorded=bool(change),
    )


def _wake(stack: StackState, split: Split, warnings: list[str]) -> None:
    """See that the original is awake where it gets a share."""
    if split.pruned < TOTAL and (warning := wake_original(stack)) is not None:
        warnings.append(warning)


def _intend(
    store: Store,
    routing: Routing,
    split: Split,
    before: float | None,
    decision: Decision,
    reason: str,
    actor: str,
    basis: Basis | None,
) -> int:
    becomes = basis.state if basis is not None else None
    if basis is None:
        becomes = _by_hand(store.saved().state, decision, split.percent, f"{reason} ({actor})")
    return store.intend(
        actor=actor,
        decision=decision,
        reason=reason,
        before=before,
        after=split.percent,
        version=split.version,
        hashes=(routing.digest(), routing.digest_of(split)),
        evidence=basis.evidence if basis is not None else None,
        state=becomes,
        revision=basis.revision if basis is not None else None,
        holder=basis.holder if basis is not None else None,
    )


def _by_hand(present: State, decision: Decision, percent: float, reason: str) -> State | None:
    """What a person's move does to a rollout under way: it no longer decides by itself."""
    if not present.active:
        return None
    now = time.time()
    if decision == "rollback":
        return roll_back(present, reason, now)
    if decision == "promote":
        return State(phase="promoted", step=present.step, began=now, reason=reason)
    return pause(present, f"set to {percent:g} % by hand: {reason}")


def _record(warnings: list[str], store: Store, change: int, *, in_force: bool) -> None:
    try:
        store.written(change)
        if in_force:
            store.confirmed(change)
    except RolloutError as exc:
        warnings.append(f"in force, but its confirmation is not recorded: {exc}")


@contextmanager
def routes_lock(state: Path, warnings: list[str], *, must: bool) -> Iterator[None]:
    """One mover at a time, so that record and routes tell the same order.

    Who must have it and does not get it is :class:`Overtaken`; a person goes on with a warning.
    """
    with (state / LOCK).open("ab") as file:
        ours = False
        with suppress(OSError):  # Where files have no locks a person goes on, too.
            ours = taken(file, fcntl.LOCK_EX, _PATIENCE)
        if not ours and must:
            raise Overtaken(
                "someone else moves traffic now",
                where="rollout",
                remedy="look at moe-serve rollout status, then decide again",
            )
        if not ours:
            warnings.append("another program was moving traffic at the same time")
        yield


def _present(routing: Routing, warnings: list[str]) -> Split | None:
    try:
        return routing.read()
    except RolloutError as exc:
        warnings.append(f"the split before is unknown: {exc}")
        return None


def status(state: Path) -> dict[str, Any]:
    """Where traffic goes now, what runs, how the rollout stands, and the last change.

    Raises:
        RolloutError: no stack was ever here.
    """
    stack = StackState.load(state)
    routing = routing_of(state)
    split = routing.read()
    in_force: bool | None = None
    try:
        in_force = routing.in_force() == split.version
    except RolloutError:
        in_force = None
    store = Store(state)
    saved = store.saved()
    last = next((c for c in store.history() if c.abandoned_at is None), None)
    return {
        "state": state_name(saved.state, split.percent),
        "step": saved.state.step,
        "reason": saved.state.reason,
        "reason_codes": saved.state.codes,
        "controller": store.lease_holder(),
        "decision": saved.seen.get("decision") if saved.state.active else None,
        "pruned_percent": split.percent,
        "shadow_percent": split.shadow_percent,
        "version": split.version,
        "in_force": in_force,
        "edited_by_hand": last is not None
        and (last.decision == "edited" or last.version != split.version),
        "endpoint": stack.endpoint,
        "control": stack.control,
        "engines": {name: engine.url for name, engine in stack.engines.items()},
        "last_change": last.to_json() if last else None,
    }


def state_name(state: State, percent: float) -> str:
    """The rollout's phase; without one, what the split amounts to."""
    if state.active or (state.phase == "rolled_back" and percent == 0.0):
        return state.phase
    if percent == 0.0:
        return "idle"
    return "promoted" if percent == 100.0 else "canary"
