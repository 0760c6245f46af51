"""Where a rollout stands, and how it gets from one place to the next.

::

    idle → shadow → canary (step 1 … n) → promoted
              any of these → paused → where it was
              any of these → rolled_back
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from moe_serve.rollout.said import Codes, codes

if TYPE_CHECKING:
    # Rolling back by hand needs none of what a policy imports, and must be quick.
    from moe_serve.rollout.policy import Policy

Phase = Literal["idle", "shadow", "canary", "paused", "promoted", "rolled_back"]
PHASES: Final[tuple[Phase, ...]] = (
    "idle",
    "shadow",
    "canary",
    "paused",
    "promoted",
    "rolled_back",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Where a rollout stands."""

    phase: Phase = "idle"
    step: int = 0
    """Index of the present step."""
    began: float = 0.0
    """When the step began, or the rollout ended; seconds since the epoch."""
    released: bool = False
    """A person let this step's gate open."""
    reason: str = ""
    """Why it is paused or rolled back."""
    codes: Codes | None = None
    """The same, where it is the controller's, for other languages."""
    before: Phase = "idle"
    """What is resumed after a pause."""

    @property
    def active(self) -> bool:
        """Whether guards watch."""
        return self.phase in ("shadow", "canary", "paused", "promoted")

    def to_json(self) -> dict[str, Any]:
        """For the store."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> State:
        """Back from the store."""
        return cls(**value)

    def target(self, policy: Policy) -> tuple[float, float]:
        """Percent of the traffic and of copies that pruned should get, where that is settled."""
        if self.phase in ("shadow", "canary"):
            step = policy.steps[self.step]
            return step.weight, step.shadow
        return (100.0, 0.0) if self.phase == "promoted" else (0.0, 0.0)


def begin(policy: Policy, at: float) -> State:
    """The first step of a rollout."""
    return enter(State(), policy, 0, at)


def enter(state: State, policy: Policy, step: int, at: float) -> State:
    """Step number ``step``, or promotion after the last."""
    if step >= len(policy.steps):
        return State(phase="promoted", step=state.step, began=at)
    phase: Phase = "canary" if policy.steps[step].weight else "shadow"
    return State(phase=phase, step=step, began=at)


def pause(state: State, reason: str) -> State:
    """Keep the share, stop advancing."""
    before = state.before if state.phase == "paused" else state.phase
    return replace(state, phase="paused", before=before, reason=str(reason), codes=codes(reason))


def resume(state: State, at: float) -> State:
    """Go on, or open a gate; the evidence is kept and the step's maximum time begins anew.

    Evidence that began anew would let a step pass that is tried often enough.
    """
    phase = state.before if state.phase == "paused" else state.phase
    # Going on after a pause is not yet a word on the gate.
    opened = state.released or state.phase != "paused"
    return replace(
        state, phase=phase, before="idle", reason="", codes=None, began=at, released=opened
    )


def roll_back(state: State, reason: str, at: float) -> State:
    """Everything on the original; the rollout is over."""
    return State(
        phase="rolled_back", step=state.step, began=at, reason=str(reason), codes=codes(reason)
    )
