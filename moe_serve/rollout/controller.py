"""The loop: read, decide, act. It owns no truth: state is in the store, traffic in the routes.

A person always wins: what they did since the state was read makes the controller's own move fail,
and it reads again. It acts only while it holds the lease.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from moe_serve.errors import MoeServeError, Overtaken, RolloutError
from moe_serve.rollout.decision import Decision, apply, decide
from moe_serve.rollout.feedback import Votes
from moe_serve.rollout.hooks import notify
from moe_serve.rollout.installed import Installed
from moe_serve.rollout.people import ACTOR, People
from moe_serve.rollout.policy import Policy
from moe_serve.rollout.prober import Prober, prober_of
from moe_serve.rollout.quality import Quality
from moe_serve.rollout.reading import Reading
from moe_serve.rollout.record import Saved
from moe_serve.rollout.recovery import recover
from moe_serve.rollout.said import say
from moe_serve.rollout.sources import Sources, sources_of
from moe_serve.rollout.store import Store
from moe_serve.rollout.trace import Trace
from moe_serve.rollout.traffic import Basis, move
from moe_serve.rollout.users import Users
from moe_serve.rollout.window import RECENT, Window
from moe_serve.serving.listener import users_file
from moe_serve.serving.routes import Split
from moe_serve.serving.routing import routing_of
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import PRUNED, VARIANTS

_IDLE: Final = 5.0
"""Seconds between looks while no rollout is under way."""
_LEASE: Final = 3.0
"""Intervals that a lease lasts, at least half a minute."""

Tell = Callable[[str], None]


class Controller:
    """Drives the rollout of one state directory."""

    def __init__(
        self,
        state: Path,
        tell: Tell,
        sources: Callable[[Policy], Sources] | None = None,
        votes: Votes | None = None,
        installed: Installed | None = None,
    ) -> None:
        """Nothing is done before :meth:`tick`.

        Args:
            state: the stack's state directory.
            tell: takes one line for the log.
            sources: makes the source of readings; by default as the policy says.
            votes: where feedback is counted.
            installed: the package as this process began with it.
        """
        self._installed = installed or Installed()
        self._votes = votes or Votes()
        self._prober: Prober | None = None
        self._folder, self._tell = state, _heard_or_not(tell)
        self._make = sources or (lambda policy: sources_of(policy, StackState.load(state)))
        self._store = Store(state)
        self._trace = Trace(state)
        self._people = People(state, self._tell)
        self._users = Users(path=users_file(state))
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._policy: tuple[str, Policy, Sources] | None = None
        self._window: Window | None = None
        self._saved: Saved | None = None
        """Where the rollout stood when the record could last be used, and this one drove it."""
        self._owed: list[dict[str, Any]] = []
        """What was decided while it could not: put on record when it can."""
        self._told = ""

    @property
    def interval(self) -> float:
        """Seconds until the next tick."""
        return self._policy[1].interval_seconds if self._policy is not None else _IDLE

    def run(self, stop: threading.Event) -> None:
        """Tick until told to stop. Whatever goes wrong in one is told, and the next one comes."""
        while not stop.is_set():
            began = time.monotonic()
            try:
                self.tick()
            except MoeServeError as exc:
                self._say(f"no decision: {exc}")
            except Exception as exc:  # noqa: BLE001 - a loop that ends in silence guards nothing
                why = self._installed.changed() or f"{type(exc).__name__}: {exc}"
                self._say(f"no decision: {why}")
            stop.wait(max(0.1, self.interval - (time.monotonic() - began)))
        self._ask_no_more()
        try:
            self._store.release(self._holder)
        except RolloutError as exc:
            self._say(f"the lease runs out by itself: {exc}")

    def tick(self) -> Decision | None:
        """One reading, one decision; ``None`` while no rollout is under way.

        Raises:
            Overtaken: another controller holds the lease, or someone acted in between.
            RolloutError: record or routes can't be used.
        """
        saved, split = self._standing()
        if not saved.state.active or saved.policy is None:
            self._policy = self._window = None
            self._ask_no_more()
            return None
        policy, sources = self._of(saved.policy)
        window = self._evidence(saved, split)
        probed = self._probed(saved, policy)
        with self._prober.quiet() if self._prober is not None else nullcontext():
            reading = self._complete(sources.read(policy))
        crowds = self._users.since(window.began + policy.warmup_seconds)
        one = float(self._users.worst(PRUNED, reading.at - RECENT))
        reading = replace(reading, crowds=crowds, one=one)
        lost = "" if split is not None else say("no-routes")
        window.add(reading, policy, lost=lost, began=saved.state.began)
        served = StackState.load(self._folder).models()
        models = saved.seen.get("models", served)
        exchanged = [name for name in VARIANTS if models[name] != served[name]]
        decision = decide(window, policy, saved.state, probed=probed, exchanged=exchanged)
        self._say(f"{decision.kind} ({decision.reason}): {decision.words}")
        seen: dict[str, Any] = {
            "window": window.to_json(),
            "decision": decision.to_json(),
            "models": models,
        }
        if probed is not None:
            seen["quality"] = probed.to_json()
        if policy.dry_run:
            seen["noted"] = _deed(decision) if decision.kind != "hold" else _noted(saved)
        try:
            self._store.save_seen(seen)
        except RolloutError as exc:
            # What was seen is kept in memory; harm does not wait for the disk.
            self._say(f"not on record: {exc}")
        if decision.kind != "hold":
            self._act(decision, saved, policy)
        try:
            # After the deed: a picture must not delay it.
            self._trace.add(window.now, saved.state.step, decision.evidence)
        except RolloutError as exc:
            self._tell(str(exc))
        return decision

    def _standing(self) -> tuple[Saved, Split | None]:
        """Where the rollout stands, and what the routes say; ``None``: they can't be read.

        While the record can't be used (a full disk, a program that holds it) a rollout that this
        controller drives stands where it last stood: guards go on, and may roll back.
        """
        try:
            self._store.lease(self._holder, max(30.0, _LEASE * self.interval))
            while self._owed:
                self._store.note("unrecorded", self._owed[0])
                del self._owed[0]
        except Overtaken:
            self._saved = None
            raise
        except RolloutError as exc:
            if self._saved is None:
                raise
            self._say(f"the record can't be used, guards go on without it: {exc}")
            return self._saved, self._routes()
        try:
            for line in recover(self._folder):
                self._tell(line)
            split: Split | None = routing_of(self._folder).read()
        except Overtaken:
            raise
        except RolloutError as exc:
            # The proxy goes on with the last good routes. Blind, and rolled back when that lasts.
            self._say(str(exc))
            split = None
        try:
            self._people.look()
        except MoeServeError as exc:
            # Who is not told now is told later; traffic does not wait for it.
            self._say(f"hooks wait: {exc}")
        self._saved = self._store.saved()
        return self._saved, split

    def _routes(self) -> Split | None:
        try:
            return routing_of(self._folder).read()
        except RolloutError as exc:
            self._say(str(exc))
            return None

    def _of(self, text: str) -> tuple[Policy, Sources]:
        if self._policy is None or self._policy[0] != text:
            policy = Policy.model_validate_json(text)
            self._policy = (text, policy, self._make(policy))
        return self._policy[1:]

    def _probed(self, saved: Saved, policy: Policy) -> Quality | None:
        """What probes said so far; they are asked from now on until the rollout ends."""
        if not saved.seen:
            self._ask_no_more()
        if not policy.guards.probed or "promoted" in (saved.state.phase, saved.state.before):
            self._ask_no_more()
            return None
        if self._prober is None:
            found = saved.seen.get("quality")
            known = Quality.from_json(found) if found is not None else None
            try:
                self._prober = prober_of(policy, StackState.load(self._folder), self._tell, known)
            except MoeServeError as exc:
                return Quality(digest="", domains={}, trouble=str(exc))
            self._prober.start()
        return self._prober.quality()

    def _ask_no_more(self) -> None:
        if self._prober is not None:
            self._prober.stop()
            self._prober = None

    def _complete(self, reading: Reading) -> Reading:
        """With the votes, and with what of the engines' counters is the probes' own."""
        arms = {}
        for name, arm in reading.arms.items():
            shares = {**arm.shares, "feedback": self._votes.counted(name)}
            probes = self._prober.counted(name, reading.edges) if self._prober is not None else {}
            arms[name] = replace(arm, shares=shares, probes=probes)
        if self._prober is not None:
            self._prober.crowded({name: arm.waiting for name, arm in arms.items()})
        return replace(reading, arms=arms)

    def _evidence(self, saved: Saved, split: Split | None) -> Window:
        """The window of the present split; a new split begins a new one."""
        if self._window is None and "window" in saved.seen:
            self._window = Window.from_json(saved.seen["window"])
            if self._window is None:
                self._tell("the evidence on record is another version's, and begins anew")
        if split is None:
            self._window = self._window or Window(began=time.time())
        elif self._window is None or self._window.version != split.version:
            self._window = Window(
                began=time.time(),
                weight=split.percent,
                shadow=split.shadow_percent,
                version=split.version,
            )
        return self._window

    def _act(self, decision: Decision, saved: Saved, policy: Policy) -> None:
        at = time.time()
        becomes = apply(decision, saved.state, policy, at)
        event = {
            "at": at,
            "actor": ACTOR,
            "state": becomes.phase,
            "step": becomes.step,
            **decision.to_json(),
        }
        if policy.dry_run:
            # Once, also where a reading in between was not enough for it.
            if _noted(saved) != _deed(decision):
                self._store.note("dry-run", event)
            return
        if decision.kind == "pause":
            self._store.note("paused", event, state=becomes, revision=saved.revision)
        else:
            percent, shadow = becomes.target(policy)
            moved = move(
                self._folder,
                percent,
                decision="rollback" if decision.kind == "rollback" else "advance",
                reason=decision.words,
                actor=ACTOR,
                shadow=shadow,
                basis=Basis(
                    state=becomes,
                    revision=saved.revision,
                    holder=self._holder,
                    evidence=decision.to_json(),
                ),
            )
            for warning in moved.warnings:
                self._tell(warning)
            if not moved.recorded:
                self._owed.append(event)
                self._saved = replace(saved, state=becomes)
        notify(policy.hooks, event, self._tell)

    def _say(self, line: str) -> None:
        """Once, until it changes."""
        if line != self._told:
            self._told = line
            self._tell(line)


def _heard_or_not(tell: Tell) -> Tell:
    """A log that can't be written, as on a full disk, keeps no guard from its work."""

    def told(line: str) -> None:
        with suppress(OSError):
            tell(line)

    return told


def _deed(decision: Decision) -> list[str]:
    """What tells one decision of a dry run from the next."""
    return [decision.kind, decision.reason]


def _noted(saved: Saved) -> list[str]:
    """The decision of a dry run that was noted last."""
    found: list[str] = saved.seen.get("noted", [])
    return found


def start(
    state: Path, tell: Tell, votes: Votes | None = None, installed: Installed | None = None
) -> tuple[threading.Thread, threading.Event]:
    """Run a controller in a thread of this process; set the event to end it."""
    stop = threading.Event()
    controller = Controller(state, tell, votes=votes, installed=installed)

    def run() -> None:
        try:
            controller.run(stop)
        finally:
            if not stop.is_set():
                # A process that looks alive and guards nothing: who watches it begins another.
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=run, daemon=True, name="controller")
    thread.start()
    return thread, stop


def summary(decision: dict[str, Any] | None) -> str:
    """A stored decision in one line."""
    return f"{decision['kind']} ({decision['reason']}): {decision['words']}" if decision else ""
