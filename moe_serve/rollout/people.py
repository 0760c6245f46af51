"""Hooks for what people decide, told by the controller from the record.

Whoever acts (a command, the API, the page, an editor on the route file) leaves a line in the log,
and need not know of hooks, nor wait for them. What was not told when a controller ended is told by
the next one: a file holds how far it got.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from moe_serve.errors import MoeServeError
from moe_serve.files import read_json, write_json
from moe_serve.rollout import view
from moe_serve.rollout.hooks import notify
from moe_serve.rollout.policy import Hooks, Policy
from moe_serve.rollout.record import Entry
from moe_serve.rollout.store import Store

FILE: Final = "told.json"
ACTOR: Final = "controller"
"""Who is no person."""
_KINDS: Final = {"intended": "", "paused": "pause", "resumed": "resume"}
"""Of lines that tell of a decision; the first tells which one itself."""
_MOST: Final = 200

Tell = Callable[[str], None]


class People:
    """Follows the log of one state directory."""

    def __init__(self, state: Path, tell: Tell) -> None:
        """Nothing is read before :meth:`look`."""
        self._folder, self._tell = state, tell
        self._store = Store(state)
        self._told: int | None = None

    def look(self) -> None:
        """Tell of what is new. The first look ever only notes where the log stands.

        Raises:
            MoeServeError: the log can't be read, or how far it was told can't be kept.
        """
        if self._told is None:
            newest = self._store.log(1)
            last, file = newest[0].id if newest else 0, self._folder / FILE
            known = int(read_json(file)["entry"]) if file.exists() else None
            # A record that is shorter than what was told of it is another one, begun anew.
            self._told = known if known is not None and known <= last else None
            if self._told is None:
                self._keep(last)
                return
        news = self._store.log(_MOST, after=self._told)
        if not news:
            return
        # Before it is told: a hook that brings the process down must not do so again and again.
        self._keep(news[-1].id)
        hooks = None
        for event in filter(None, map(_event, news)):
            hooks = hooks or self._hooks()
            notify(hooks, event, self._tell)

    def _keep(self, entry: int) -> None:
        write_json(self._folder / FILE, {"entry": entry})
        self._told = entry

    def _hooks(self) -> Hooks:
        """Of the latest rollout, or of the next one where there was none."""
        policy = self._store.saved().policy
        if policy is not None:
            return Policy.model_validate_json(policy).hooks
        with suppress(MoeServeError):
            return view.rules(self._folder).hooks
        return Hooks()


def _event(entry: Entry) -> dict[str, Any] | None:
    """What is told; ``None`` where it is no decision of a person."""
    body, change = entry.body, entry.change
    if entry.kind not in _KINDS or body.get("actor", ACTOR) == ACTOR:
        return None
    if change is not None and change.abandoned_at is not None:
        return None
    told = {
        "at": body["at"],
        "actor": body["actor"],
        "kind": _KINDS[entry.kind] or body["decision"],
        "reason": "by hand",
        "words": body["reason"],
    }
    if change is not None:
        told["percent_before"] = change.percent_before
        told["percent_after"] = change.percent_after
    return told
