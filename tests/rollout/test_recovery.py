"""A process that dies between any two writes leaves nothing that the next one can't put right."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_serve import files
from moe_serve.errors import RolloutError
from moe_serve.rollout.commands import pause_rollout, resume_rollout, start_rollout
from moe_serve.rollout.policy import Policy, Step
from moe_serve.rollout.recovery import recover
from moe_serve.rollout.state import State, enter, roll_back
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import Basis, Decision, move, status
from moe_serve.serving import routes
from moe_serve.serving.envoy import Admin
from moe_serve.serving.routes import new_split, read_split, route_file, write_split
from tests.support.stacks import fake_stack

BEFORE = State(phase="canary", step=0, began=1.0)
AFTER = State(phase="canary", step=1, began=2.0)


class Killed(BaseException):
    """The process is gone here."""


def prepared(state: Path) -> None:
    """At 5 %, on record and confirmed, a rollout under way."""
    fake_stack(state)
    write_split(state, 0)
    move(state, 5, decision="set", reason="")
    store = Store(state)
    store.confirmed(store.history()[0].id)
    store.note("prepared", {}, state=BEFORE)


class Deaths:
    """Counts the boundaries between durable writes, and dies at one of them.

    A boundary is before and after each transaction, before and after the rename of a file, and
    after its content is on disk: whatever writes is counted, so a new write is tried too.
    """

    def __init__(self, patch: pytest.MonkeyPatch, state: Path, at: int | None = None) -> None:
        self.passed, self._at = 0, at
        writing, atomic = Store._writing, files.write_atomic

        @contextmanager
        def transaction(store: Store) -> Iterator[sqlite3.Connection]:
            self.boundary()
            with writing(store) as db:
                yield db
                # Before its commit: nothing of it is there afterwards.
                self.boundary()
            self.boundary()

        def file(path: Path, data: bytes) -> None:
            self.boundary()
            path.with_name(f".{path.name}.tmp").write_bytes(data)
            self.boundary()
            atomic(path, data)
            self.boundary()

        patch.setattr(Store, "_writing", transaction)
        patch.setattr(routes, "write_atomic", file)
        # Envoy answers by what is on disk.
        patch.setattr(Admin, "confirm", lambda *_: 0.0)
        patch.setattr(Admin, "route_version", lambda _: read_split(state).version)

    def boundary(self) -> None:
        """The next one."""
        self.passed += 1
        if self.passed - 1 == self._at:
            raise Killed


POLICY = Policy(
    steps=(Step(weight=0, min_seconds=0), Step(weight=0, shadow=5), Step(weight=5), Step(weight=25))
)
Place = tuple[float, float, str, int]
"""Percent, copies, phase, step."""


def found(state: Path) -> Place:
    """What traffic and record say."""
    split, saved = read_split(state), Store(state).saved().state
    return split.percent, split.shadow_percent, saved.phase, saved.step


def stand(state: Path, step: int | None, *, paused: bool = False) -> None:
    """A rollout at a step of the policy, on record, written and confirmed; or none yet."""
    fake_stack(state)
    write_split(state, 0)
    store = Store(state)
    store.lease("someone", 600.0)
    move(state, 0, decision="set", reason="")
    if step is not None:
        becomes = enter(State(), POLICY, step, 1.0)
        store.note("policy", {}, state=becomes, policy=POLICY.model_dump_json())
        percent, shadow = becomes.target(POLICY)
        basis = Basis(state=becomes, revision=store.saved().revision)
        move(state, percent, shadow=shadow, decision="advance", reason="", basis=basis)
    if paused:
        pause_rollout(state, reason="lunch")


def act(state: Path, decision: Decision, becomes: State) -> None:
    """As the controller does."""
    percent, shadow = becomes.target(POLICY)
    basis = Basis(state=becomes, revision=Store(state).saved().revision)
    move(state, percent, shadow=shadow, decision=decision, reason="test", basis=basis)


def onwards(state: Path) -> None:
    """To the next step, or to the end of them."""
    present = Store(state).saved().state
    act(state, "advance", enter(present, POLICY, present.step + 1, 2.0))


def back(state: Path) -> None:
    """By a guard."""
    act(state, "rollback", roll_back(Store(state).saved().state, "harm", 2.0))


def by_hand(decision: Decision, percent: float) -> Callable[[Path], None]:
    """A person's move."""
    return lambda state: void(move(state, percent, decision=decision, reason="", actor="me"))


def void(_value: object) -> None:
    """Nothing."""


def edited(percent: int) -> Callable[[Path], None]:
    """Someone wrote the file; that it is noticed is what may be interrupted."""

    def edit(state: Path) -> None:
        if read_split(state).percent != percent:
            text = new_split(percent).encode()
            route_file(state).write_bytes(text)
        recover(state)

    return edit


TRANSITIONS: dict[str, tuple[int | None, bool, Callable[[Path], None]]] = {
    "start": (None, False, lambda s: void(start_rollout(s, POLICY, reason="", actor="me"))),
    "probes to shadow": (0, False, onwards),
    "shadow to canary": (1, False, onwards),
    "canary to canary": (2, False, onwards),
    "canary to promoted": (3, False, onwards),
    "rollback from probes": (0, False, back),
    "rollback from shadow": (1, False, back),
    "rollback from canary": (3, False, back),
    "rollback from promoted": (4, False, back),
    "rollback from paused": (2, True, back),
    "pause": (2, False, lambda s: pause_rollout(s, reason="")),
    "resume": (2, True, lambda s: void(resume_rollout(s, reason=""))),
    "set by hand": (2, False, by_hand("set", 40)),
    "promoted by hand": (2, False, by_hand("promote", 100)),
    "rolled back by hand": (2, False, by_hand("rollback", 0)),
    "rolled back by hand, paused": (2, True, by_hand("rollback", 0)),
    "edited": (2, False, edited(40)),
    "edited to nothing": (2, False, edited(0)),
}


@pytest.mark.parametrize("name", TRANSITIONS)
def test_every_death_in_every_transition(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at each boundary: the state is the one before or after, and traffic agrees with it.

    The record has no gap, what is on disk is confirmed, a second recovery finds nothing, and a
    rollback that was once on record is never lost. The recovery itself is killed likewise.
    """
    step, paused, action = TRANSITIONS[name]

    def placed(number: int) -> Path:
        folder = tmp_path / str(number)
        folder.mkdir()
        stand(folder, step, paused=paused)
        return folder

    with monkeypatch.context() as patch:
        whole = placed(-1)
        deaths = Deaths(patch, whole)
        before = found(whole)
        action(whole)
        after, number = found(whole), deaths.passed
    assert before != after
    assert number >= 3
    seen = set()
    for at in range(number):
        state = placed(at)
        with monkeypatch.context() as patch:
            Deaths(patch, state, at)
            with pytest.raises(Killed):
                action(state)
        known = [c for c in Store(state).history() if c.decision == "rollback"]
        mended(state, monkeypatch)
        place = found(state)
        assert place in (before, after), at
        if known:
            assert place == after
        seen.add(place)
        last = next(c for c in Store(state).history() if c.abandoned_at is None)
        split = read_split(state)
        assert (last.version, last.percent_after) == (split.version, split.percent)
        assert last.confirmed_at is not None
        assert Store(state).verify().problems == ()
    # An edit by hand is there before anyone can be interrupted.
    assert seen == ({after} if name.startswith("edited") else {before, after})


def mended(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recover, killed after ever more of its own writes until it gets through; twice."""
    for at in range(100):
        with monkeypatch.context() as patch:
            Deaths(patch, state, at)
            try:
                recover(state)
            except Killed:
                continue
            assert recover(state) == ()
            return
    pytest.fail("recovery does not end")


SCRIPT = """
import os, signal, sys
from pathlib import Path
from moe_serve.rollout import traffic
from moe_serve.rollout.state import State
from moe_serve.rollout.store import Store
from moe_serve.serving import routing

def die(*_args, **_named):
    os.kill(os.getpid(), signal.SIGKILL)

state, point = Path(sys.argv[1]), sys.argv[2]
if point == "put":
    routing.put_split = die
else:
    setattr(Store, point, die)
basis = traffic.Basis(
    state=State(phase="canary", step=1, began=2.0), revision=Store(state).saved().revision
)
traffic.move(state, 25, decision="advance", reason="", basis=basis)
"""


@pytest.mark.parametrize(("point", "percent"), [("put", 5.0), ("written", 25.0)])
def test_a_process_that_is_really_killed(point: str, percent: float, tmp_path: Path) -> None:
    """SIGKILL, and another process puts it right; the lock died with the first."""
    prepared(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), point],
        cwd=Path(__file__).parents[2],
        env=os.environ,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert recover(tmp_path) != ()
    assert read_split(tmp_path).percent == percent
    assert Store(tmp_path).saved().state == (AFTER if percent == 25.0 else BEFORE)
    assert Store(tmp_path).verify().problems == ()


def test_an_edit_by_hand_is_recorded_and_pauses(tmp_path: Path) -> None:
    """And is left as it is, once noticed and for good."""
    prepared(tmp_path)
    path = route_file(tmp_path)
    path.write_text(path.read_text().replace(": 9500", ": 6000").replace(": 500", ": 4000"))
    assert read_split(tmp_path).percent == 40.0
    assert "edited by hand: 40 %" in recover(tmp_path)[0]
    assert recover(tmp_path) == ()
    saved = Store(tmp_path).saved().state
    assert (saved.phase, saved.before) == ("paused", "canary")
    assert read_split(tmp_path).percent == 40.0
    assert Store(tmp_path).history()[0].decision == "edited"


def test_an_edit_to_nothing_is_a_rollback(tmp_path: Path) -> None:
    """As a rollback with the record locked leaves it."""
    prepared(tmp_path)
    write_split(tmp_path, 0)
    recover(tmp_path)
    assert Store(tmp_path).saved().state.phase == "rolled_back"
    assert status(tmp_path)["edited_by_hand"] is True


def test_a_person_wins_over_a_controller_that_has_decided(tmp_path: Path) -> None:
    """It read the state, a person rolled back, it acts: refused, the file stays."""
    prepared(tmp_path)
    basis = Basis(state=AFTER, revision=Store(tmp_path).saved().revision)
    move(tmp_path, 0, decision="rollback", reason="fire", actor="person")
    with pytest.raises(RolloutError, match="someone else"):
        move(tmp_path, 25, decision="advance", reason="", basis=basis)
    assert read_split(tmp_path).percent == 0
    assert Store(tmp_path).saved().state.phase == "rolled_back"


def test_a_share_set_by_hand_pauses_and_a_promotion_promotes(tmp_path: Path) -> None:
    """The rollout stops deciding; guards go on."""
    prepared(tmp_path)
    move(tmp_path, 30, decision="set", reason="", actor="person")
    assert Store(tmp_path).saved().state.phase == "paused"
    move(tmp_path, 100, decision="promote", reason="", actor="person")
    assert Store(tmp_path).saved().state.phase == "promoted"
    assert status(tmp_path)["state"] == "promoted"
