"""A process that dies between any two writes leaves nothing that the next one can't put right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_serve.errors import RolloutError
from moe_serve.rollout import traffic
from moe_serve.rollout.recovery import recover
from moe_serve.rollout.state import State
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import Basis, Decision, move, status
from moe_serve.serving.envoy import Admin
from moe_serve.serving.routes import put_split, read_split, route_file, write_split
from tests.support.stacks import fake_stack

BEFORE = State(phase="canary", step=0, began=1.0)
AFTER = State(phase="canary", step=1, began=2.0)
POINTS = ("intend-before", "intend-after", "put-before", "put-after", "confirm", "written-before",
          "written-after", "confirmed-before", "confirmed-after")  # fmt: skip


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


def arm(monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """Die at a point of the next move; Envoy answers by what is on disk."""
    where, _, when = point.partition("-")

    def deadly(function: object) -> object:
        def run(*args: object, **named: object) -> object:
            if when == "before":
                raise Killed
            result = function(*args, **named)  # type: ignore[operator]  # any of the five
            if when == "after":
                raise Killed
            return result

        return run

    def confirm(_admin: Admin, _version: str) -> float:
        if where == "confirm":
            raise Killed
        return 0.0

    monkeypatch.setattr(Admin, "confirm", confirm)
    if where == "put":
        monkeypatch.setattr(traffic, "put_split", deadly(put_split))
    elif where != "confirm":
        name = where
        monkeypatch.setattr(Store, name, deadly(getattr(Store, name)))


def advance(state: Path, decision: Decision, percent: float, becomes: State) -> None:
    """As the controller does."""
    basis = Basis(state=becomes, revision=Store(state).saved().revision)
    move(state, percent, decision=decision, reason="test", basis=basis)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("decision", ["advance", "rollback"])
def test_every_point_of_death(
    point: str, decision: Decision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards the file, the record and the state agree, and a rollback is never lost."""
    prepared(tmp_path)
    percent = 25.0 if decision == "advance" else 0.0
    becomes = AFTER if decision == "advance" else State(phase="rolled_back", step=0, began=2.0)
    with monkeypatch.context() as patch:
        arm(patch, point)
        with pytest.raises(Killed):
            advance(tmp_path, decision, percent, becomes)
        patch.undo()
        patch.setattr(Admin, "route_version", lambda _: read_split(tmp_path).version)
        recover(tmp_path)
        again = recover(tmp_path)
    assert again == ()
    on_disk = read_split(tmp_path).percent
    saved = Store(tmp_path).saved().state
    last = next(c for c in Store(tmp_path).history() if c.abandoned_at is None)
    assert (last.percent_after, last.version) == (on_disk, read_split(tmp_path).version)
    assert last.confirmed_at is not None
    intended = point != "intend-before"
    reached = intended and (decision == "rollback" or point not in ("intend-after", "put-before"))
    assert on_disk == (percent if reached else 5.0)
    assert saved == (becomes if reached else BEFORE)
    assert Store(tmp_path).verify().problems == ()


SCRIPT = """
import os, signal, sys
from pathlib import Path
from moe_serve.rollout import traffic
from moe_serve.rollout.state import State
from moe_serve.rollout.store import Store

def die(*_args, **_named):
    os.kill(os.getpid(), signal.SIGKILL)

state, point = Path(sys.argv[1]), sys.argv[2]
if point == "put":
    traffic.put_split = die
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
