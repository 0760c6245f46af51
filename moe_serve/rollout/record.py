"""What the record holds, as its readers get it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from moe_serve.rollout.state import State


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change of the split."""

    id: int
    at: float
    """Seconds since the epoch when it was intended."""
    actor: str
    decision: str
    """``set``, ``start``, ``advance``, ``resume``, ``promote``, ``rollback``, ``edited``."""
    reason: str
    percent_before: float | None
    percent_after: float
    version: str
    """Of the route file."""
    hash_before: str | None
    """SHA-256 of the route file."""
    hash_after: str | None
    written_at: float | None
    """When the route file was in place."""
    confirmed_at: float | None
    """When Envoy said it was in force."""
    abandoned_at: float | None
    """When it was found never to have been written, and given up."""
    evidence: Any
    """What it rested on: the controller's decision as JSON; empty where a person decided."""

    @classmethod
    def of(cls, row: tuple[Any, ...]) -> Change:
        """From its columns, in the order of the fields."""
        values = dict(zip(cls.__slots__, row, strict=True))
        return cls(**{**values, "evidence": json.loads(values["evidence"])})

    def to_json(self) -> dict[str, Any]:
        """For API and CLI."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the audit log."""

    id: int
    kind: str
    """``intended``, ``written``, ``confirmed``, ``abandoned``, ``paused``, ``dry-run``, ..."""
    body: dict[str, Any]
    change: Change | None
    """The change that an ``intended`` began, as it stands now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """Where the rollout stands on disk."""

    revision: int
    """Grows with each change of the state; who acts on an old one is refused."""
    state: State
    policy: str | None
    """The policy that it began with, as JSON."""
    seen: dict[str, Any]
    """The window of evidence and the last decision."""
