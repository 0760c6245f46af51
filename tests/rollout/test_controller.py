"""The loop, with the real Envoy and upstreams that speak like engines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from moe_serve.errors import Overtaken, RolloutError
from moe_serve.rollout.commands import pause_rollout, resume_rollout, start_rollout
from moe_serve.rollout.controller import Controller
from moe_serve.rollout.policy import Step
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import move
from moe_serve.serving.routes import read_split, route_file
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.proxy import Proxied, proxied
from tests.support.rollouts import POLICY, QUICK, ask, begun, holding, phase, until_rolled_back


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxied]:
    """Envoy and two upstreams that answer at once."""
    with proxied(tmp_path, chunks=1, pause=0.0) as running:
        yield running


def test_a_healthy_rollout_walks_to_the_end(proxy: Proxied) -> None:
    """Copies first, then half of the traffic, then all; each move confirmed and on record."""
    with begun(proxy) as controller:
        seen = [phase(proxy)]
        for _ in range(12):
            ask(proxy, 150)
            time.sleep(0.1)
            controller.tick()
            if phase(proxy) != seen[-1]:
                seen.append(phase(proxy))
        assert seen == [("shadow", 0, 100), ("canary", 50, 0), ("promoted", 100, 0)]
        decisions = [c.decision for c in Store(proxy.state).history()]
        assert decisions == ["advance", "advance", "start"]
        assert all(c.confirmed_at for c in Store(proxy.state).history())
        assert Store(proxy.state).verify().problems == ()


@pytest.mark.parametrize("what", ["fail_every", "slow_every"])
def test_a_regression_is_rolled_back(what: str, proxy: Proxied) -> None:
    """Every request but few: while only copies go there no client has seen one."""
    setattr(proxy.pruned, what, 1 if what == "slow_every" else 2)
    with begun(proxy) as controller:
        until_rolled_back(proxy, controller)
        assert phase(proxy) == ("rolled_back", 0, 0)
        last = Store(proxy.state).history()[0]
        assert (last.actor, last.decision) == ("controller", "rollback")
        assert last.confirmed_at is not None
        with pytest.raises(RolloutError, match="--force"):
            start_rollout(proxy.state, POLICY, reason="again")
        start_rollout(proxy.state, POLICY, reason="again", force=True)
        assert phase(proxy) == ("shadow", 0, 100)


def test_a_second_controller_does_nothing(proxy: Proxied) -> None:
    """Until the first is gone."""
    with begun(proxy) as controller:
        second = Controller(proxy.state, lambda _: None)
        with pytest.raises(Overtaken):
            second.tick()
        stop = threading.Event()
        stop.set()
        controller.run(stop)
        assert second.tick() is not None


def test_evidence_survives_a_controller(proxy: Proxied) -> None:
    """The next one goes on with the counts of the first."""
    with begun(proxy) as controller:
        ask(proxy, 15)
        time.sleep(0.1)
        controller.tick()
        assert controller._window is not None
        counted = controller._window.failures[ORIGINAL][1]
        assert counted == 15
        Store(proxy.state).release(controller._holder)
        second = Controller(proxy.state, lambda _: None)
        second.tick()
        assert second._window is not None
        assert second._window.failures[ORIGINAL][1] == counted


def test_a_person_wins(proxy: Proxied) -> None:
    """Set, resume, pause, an edit of the file: each is recorded, none is undone."""
    with begun(proxy) as controller:
        move(proxy.state, 30, decision="set", reason="look")
        controller.tick()
        assert phase(proxy) == ("paused", 30, 0)
        resume_rollout(proxy.state, reason="go on")
        assert phase(proxy) == ("shadow", 0, 100)
        pause_rollout(proxy.state, reason="lunch")
        ask(proxy, 300)
        time.sleep(0.1)
        controller.tick()
        controller.tick()
        assert phase(proxy) == ("paused", 0, 100)
        assert resume_rollout(proxy.state, reason="back") is None
        file = route_file(proxy.state)
        copy = file.with_name("edited")
        text = json.loads(file.read_text())
        for route in text["resources"][0]["virtual_hosts"][0]["routes"]:
            for cluster in route.get("route", {}).get("weighted_clusters", {}).get("clusters", ()):
                cluster["weight"] = 7000 if cluster["name"] == ORIGINAL else 3000
        copy.write_text(json.dumps(text))
        copy.rename(file)
        controller.tick()
        assert phase(proxy)[:2] == ("paused", 30)
        assert read_split(proxy.state).percent == 30


def test_an_unreadable_route_file_is_blindness(proxy: Proxied) -> None:
    """Held, then rolled back with a good file."""
    with begun(proxy) as controller:
        route_file(proxy.state).write_text("{")
        kinds = []
        for _ in range(40):
            decision = controller.tick()
            kinds.append(decision.kind if decision else "ended")
            if kinds[-1] != "hold":
                break
            time.sleep(0.1)
        assert kinds[0] == "hold"
        assert kinds[-1] == "rollback"
        assert read_split(proxy.state).percent == 0


def test_a_record_that_is_held_does_not_hold_up_a_rollback(proxy: Proxied) -> None:
    """Every second request fails while another program has the database: back all the same.

    What it rested on is put on record once that can be written; nobody steps forward meanwhile.
    """
    steps = (Step(weight=50, **QUICK), Step(weight=90, **QUICK))
    with begun(proxy, POLICY.model_copy(update={"steps": steps})) as controller:
        with holding(proxy.state):
            ask(proxy, 300)
            time.sleep(0.1)
            with pytest.raises(RolloutError, match="the record can't be used"):
                controller.tick()
            assert read_split(proxy.state).percent == 50
            proxy.pruned.fail_every = 2
            for _ in range(20):
                ask(proxy, 100)
                time.sleep(0.1)
                # So few failures may still be within the margin, and a step forward due.
                with suppress(RolloutError):
                    controller.tick()
                if read_split(proxy.state).percent != 50:
                    break
            assert read_split(proxy.state).percent == 0
            assert controller.tick() is None
        controller.tick()
        assert phase(proxy) == ("rolled_back", 0, 0)
        (entry,) = [e for e in Store(proxy.state).log() if e.kind == "unrecorded"]
        assert (entry.body["kind"], entry.body["reason"]) == ("rollback", "harm")


@pytest.mark.parametrize("variant", [ORIGINAL, PRUNED])
def test_evidence_of_one_checkpoint_lets_no_other_on(proxy: Proxied, variant: str) -> None:
    """Stopped in mid-rollout and started with another one in the same place: back to the start."""
    with begun(proxy) as controller:
        stack = StackState.load(proxy.state)
        engine = replace(stack.engines[variant], weights="another")
        replace(stack, engines={**stack.engines, variant: engine}).save(proxy.state)
        controller.tick()
        assert phase(proxy) == ("rolled_back", 0, 0)
        assert Store(proxy.state).history()[0].reason.startswith(f"{variant}: another checkpoint")


def test_a_log_that_cannot_be_written_stops_no_guard(proxy: Proxied) -> None:
    """The disk is full: neither line nor record, and harm is rolled back all the same."""

    def full(_line: str) -> None:
        raise OSError(28, "No space left on device")

    proxy.pruned.fail_every = 2
    with begun(proxy) as first:
        Store(proxy.state).release(first._holder)
        controller = Controller(proxy.state, full)
        until_rolled_back(proxy, controller)
        assert phase(proxy) == ("rolled_back", 0, 0)


def test_a_controller_that_dies_takes_its_process_along(tmp_path: Path) -> None:
    """A process that looks alive and guards nothing would not be begun anew."""
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from moe_serve.rollout import controller\n"
        "def run(self, stop): raise SystemExit\n"
        "controller.Controller.run = run\n"
        "controller.start(Path(sys.argv[1]), print)\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=50, check=False)
    assert done.returncode == -signal.SIGTERM


def test_a_dry_run_leaves_users_where_they_are(proxy: Proxied) -> None:
    """A policy whose first step has users: they stay, and what is seen is judged all the same."""
    steps = (Step(weight=50, **QUICK),)
    with begun(proxy, POLICY.model_copy(update={"dry_run": True, "steps": steps})) as controller:
        assert phase(proxy) == ("canary", 0, 0)
        ask(proxy, 50)
        controller.tick()
        assert phase(proxy) == ("canary", 0, 0)


def test_a_dry_run_moves_nothing(proxy: Proxied) -> None:
    """It says in the log what it would have done, once; also if it hesitated in between."""
    with begun(proxy, POLICY.model_copy(update={"dry_run": True})) as controller:
        for _ in range(5):
            ask(proxy, 150)
            time.sleep(0.1)
            controller.tick()
            store = Store(proxy.state)
            seen = store.saved().seen
            store.save_seen(seen | {"decision": seen["decision"] | {"kind": "hold", "reason": "?"}})
        assert phase(proxy) == ("shadow", 0, 100)
        with Store(proxy.state)._open() as db:
            notes = db.execute("SELECT body FROM audit WHERE kind = 'dry-run'").fetchall()
        assert len(notes) == 1
        assert json.loads(notes[0][0])["kind"] == "advance"


def test_nothing_starts_unwatched(proxy: Proxied) -> None:
    """Without a controller, and twice."""
    with pytest.raises(RolloutError, match="up --policy"):
        start_rollout(proxy.state, POLICY, reason="")
    with begun(proxy), pytest.raises(RolloutError, match="under way"):
        start_rollout(proxy.state, POLICY, reason="")
