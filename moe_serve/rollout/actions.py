"""What a person can tell a rollout from afar, by name."""

from __future__ import annotations

from pathlib import Path

from moe_serve.errors import RolloutError
from moe_serve.rollout import schema, view
from moe_serve.rollout.commands import pause_rollout, resume_rollout, start_rollout
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import Moved, move


def act(
    state: Path,
    action: schema.Action,
    *,
    actor: str,
    reason: str = "",
    percent: float = 0.0,
    force: bool = False,
) -> schema.Done:
    """Do it.

    Args:
        state: the stack's state directory.
        action: what.
        actor: which surface asked, for the record.
        reason: a person's.
        percent: of ``set``.
        force: ``start`` also within the cool-down.

    Raises:
        MoeServeError: it can't be done as things stand.
    """
    moved: Moved | None = None
    if action == "start":
        moved = start_rollout(state, view.rules(state), reason=reason, actor=actor, force=force)
    elif action == "pause":
        pause_rollout(state, reason=reason, actor=actor)
    elif action == "resume":
        moved = resume_rollout(state, reason=reason, actor=actor)
    else:
        percent = {"promote": 100.0, "rollback": 0.0}.get(action, percent)
        moved = move(state, percent, decision=action, reason=reason, actor=actor)
    try:
        phase = Store(state).saved().state.phase
    except RolloutError:
        # The traffic has moved all the same, and that is what the answer is about.
        phase = "rolled_back" if action == "rollback" else "idle"
    return schema.Done(
        state=phase,
        moved=schema.Moved.model_validate(moved.to_json()) if moved is not None else None,
    )
