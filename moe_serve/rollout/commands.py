"""What a person tells a rollout. Each is recorded, and none waits for the controller."""

from __future__ import annotations

import time
from pathlib import Path

from moe_serve.errors import RolloutError, UsageError
from moe_serve.rollout.person import printable, whoami
from moe_serve.rollout.policy import Policy
from moe_serve.rollout.probes import load_probes
from moe_serve.rollout.record import Saved
from moe_serve.rollout.state import begin, pause, resume
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import Basis, Moved, move
from moe_serve.serving.routing import routing_of
from moe_serve.serving.state import StackState


def start_rollout(
    state: Path, policy: Policy, *, reason: str, actor: str = "", force: bool = False
) -> Moved:
    """Begin with the policy's first step; a dry run moves no user.

    Args:
        state: the stack's state directory.
        policy: kept with the rollout; a later change of its file changes nothing.
        reason: for the record.
        actor: by default the user.
        force: also within the cool-down after a rollback.

    Raises:
        RolloutError: one is under way, none can be watched, or it is too early.
        UsageError: the probes are not those that the policy names.
    """
    _can_stick(state, policy)
    _can_count(state, policy)
    store = Store(state)
    saved = store.saved()
    now = time.time()
    if saved.state.active:
        raise RolloutError(
            f"a rollout is under way ({saved.state.phase})",
            remedy="moe-serve rollout rollback ends it",
            where=str(state),
        )
    if store.lease_holder() is None:
        raise RolloutError(
            "no controller watches this stack",
            remedy="start it with moe-serve up --policy policy.toml",
            where=str(state),
        )
    left = saved.state.began + policy.cooldown_seconds - now
    if saved.state.phase == "rolled_back" and left > 0.0 and not force:
        raise RolloutError(
            f"rolled back a short while ago: {saved.state.reason}",
            remedy=f"find out why, then wait {left / 60.0:.0f} minutes or give --force",
            where=str(state),
        )
    policy = _pinned(policy)
    event = {"actor": actor or whoami(), "reason": printable(reason), "digest": policy.digest}
    text = policy.model_dump_json()
    store.note("policy", {**event, "policy": text}, policy=text, revision=saved.revision)
    becomes = begin(policy, now)
    percent, shadow = becomes.target(policy)
    if policy.dry_run:
        # Users stay where they are; copies of their requests are all that it may ask for.
        percent = routing_of(state).read().percent
        shadow = shadow if percent == 0.0 else 0.0
    return move(
        state,
        percent,
        decision="start",
        reason=reason,
        actor=actor,
        shadow=shadow,
        sticky=policy.sticky.ways if policy.sticky != "off" else (),
        basis=Basis(state=becomes, revision=saved.revision),
    )


def _can_stick(state: Path, policy: Policy) -> None:
    """Nobody is told that users stay where they do not."""
    if policy.sticky != "off" and not routing_of(state).sticks:
        raise RolloutError(
            "an HTTPRoute cannot keep a user on one variant",
            where="policy",
            remedy='write sticky = "off", or let moe-serve\'s own Envoy split',
        )


def _can_count(state: Path, policy: Policy) -> None:
    """Nobody is told that clients are patient where that is not seen."""
    if policy.guards.abandoned != "off" and StackState.load(state).http_route is not None:
        raise RolloutError(
            "a gateway does not tell which requests were given up",
            where="policy",
            remedy='write abandoned = "off" under [guards], or let moe-serve\'s own Envoy split',
        )


def _pinned(policy: Policy) -> Policy:
    """With the hash of its probes, so that evidence is about one set from beginning to end."""
    if not policy.guards.probed:
        return policy
    probes, pinned = policy.probes, load_probes(policy.probes).digest
    if probes.sha256 not in ("", pinned):
        raise UsageError(
            f"the probes have the hash {pinned}, the policy names another",
            where=str(probes.texts or "the package's probes"),
            remedy="put back the file, or correct probes.sha256",
        )
    return policy.model_copy(update={"probes": probes.model_copy(update={"sha256": pinned})})


def pause_rollout(state: Path, *, reason: str, actor: str = "") -> None:
    """Keep the share; guards go on watching.

    Raises:
        RolloutError: there is none under way.
    """
    store, saved = _under_way(state)
    who, reason = actor or whoami(), printable(reason)
    becomes = pause(saved.state, f"{reason or 'by hand'} ({who})")
    event = {"actor": who, "reason": reason}
    store.note("paused", event, state=becomes, revision=saved.revision)


def resume_rollout(state: Path, *, reason: str, actor: str = "") -> Moved | None:
    """Go on after a pause, or open the gate of a step; evidence is kept.

    Where the split was changed by hand meanwhile, the step's own share is put back, and its
    evidence begins anew with it.

    Returns:
        The move, where there was one.

    Raises:
        RolloutError: there is none under way.
    """
    store, saved = _under_way(state)
    if saved.policy is None:
        raise RolloutError(
            "this rollout has no policy to go on with",
            where=str(state),
            remedy="moe-serve rollout rollback ends it",
        )
    policy = Policy.model_validate_json(saved.policy)
    becomes = resume(saved.state, time.time())
    percent, shadow = becomes.target(policy)
    split = routing_of(state).read()
    if (round(split.percent, 2), round(split.shadow_percent, 2)) != (percent, shadow):
        basis = Basis(state=becomes, revision=saved.revision)
        return move(
            state,
            percent,
            decision="resume",
            reason=reason,
            actor=actor,
            shadow=shadow,
            basis=basis,
        )
    event = {"actor": actor or whoami(), "reason": printable(reason)}
    store.note("resumed", event, state=becomes, revision=saved.revision)
    return None


def _under_way(state: Path) -> tuple[Store, Saved]:
    StackState.load(state)
    store = Store(state)
    saved = store.saved()
    if not saved.state.active:
        raise RolloutError(
            f"no rollout is under way (it is {saved.state.phase})",
            remedy="moe-serve rollout start begins one",
            where=str(state),
        )
    return store, saved
