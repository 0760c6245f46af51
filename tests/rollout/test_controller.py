"""The loop, with the real Envoy and upstreams that speak like engines."""

from __future__ import annotations

import getpass
import json
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from moe_serve.errors import Overtaken, RolloutError
from moe_serve.files import read_json, write_json
from moe_serve.rollout.commands import pause_rollout, resume_rollout, start_rollout
from moe_serve.rollout.controller import Controller
from moe_serve.rollout.people import FILE, People
from moe_serve.rollout.policy import (
    ErrorGuard,
    Guards,
    Hooks,
    LatencyGuard,
    Policy,
    Probes,
    QualityGuard,
    ShareGuard,
    Step,
)
from moe_serve.rollout.prober import prober_of
from moe_serve.rollout.store import DATABASE, Store
from moe_serve.rollout.traffic import move, status
from moe_serve.serving.routes import read_split, route_file
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.proxy import Proxied, proxied

QUICK = {"min_seconds": 0.0, "min_requests": 20, "max_seconds": 3600.0}
POLICY = Policy(
    steps=(Step(weight=0, shadow=100, **QUICK), Step(weight=50, **QUICK)),
    guards=Guards(
        errors=ErrorGuard(margin=0.2),
        ttft=LatencyGuard(objective=1.0, margin=0.4),
        tpot=LatencyGuard(objective=0.1, margin=0.4),
        truncated=ShareGuard(margin=0.4),
        empty=ShareGuard(margin=0.4),
        quality="off",
        garbage="off",
    ),
    strata=(),
    warmup_seconds=0.0,
    interval_seconds=0.5,
    blind_seconds=3.0,
)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxied]:
    """Envoy and two upstreams that answer at once."""
    with proxied(tmp_path, chunks=1, pause=0.0) as running:
        yield running


def ask(proxy: Proxied, count: int) -> None:
    """Requests, eight at a time."""
    with httpx.Client() as client, ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda _: client.post(f"{proxy.endpoint}/completions", json={}), range(count))
        )


@contextmanager
def begun(proxy: Proxied, policy: Policy = POLICY) -> Iterator[Controller]:
    """A controller that has the lease, and a rollout at its first step."""
    controller = Controller(proxy.state, lambda _: None)
    controller.tick()
    start_rollout(proxy.state, policy, reason="test")
    controller.tick()
    yield controller


@contextmanager
def holding(state: Path) -> Iterator[None]:
    """Another program holds the record."""
    db = sqlite3.connect(state / DATABASE, isolation_level=None)
    db.execute("BEGIN EXCLUSIVE")
    yield
    db.execute("ROLLBACK")
    db.close()


def phase(proxy: Proxied) -> tuple[str, float, float]:
    """State, percent, copies."""
    found = status(proxy.state)
    return found["state"], found["pruned_percent"], found["shadow_percent"]


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
        for _ in range(20):
            ask(proxy, 100)
            time.sleep(0.1)
            controller.tick()
            if phase(proxy)[0] == "rolled_back":
                break
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
                decision = controller.tick()
                if decision is not None and decision.kind == "rollback":
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


def test_hooks_are_told(proxy: Proxied, tmp_path: Path) -> None:
    """A command gets the decision as JSON; one that fails changes nothing."""
    target = tmp_path / "told"
    code = (
        f"import json, sys, pathlib; text, file = sys.stdin.read(), pathlib.Path({str(target)!r});"
        " json.loads(text)['actor'] == 'controller' and file.write_text(text)"
    )
    hooks = Hooks(command=(sys.executable, "-c", code), webhook="http://127.0.0.1:1/none")
    with begun(proxy, POLICY.model_copy(update={"hooks": hooks})) as controller:
        for _ in range(6):
            ask(proxy, 150)
            time.sleep(0.1)
            controller.tick()
            if phase(proxy)[0] == "canary":
                break
        until = time.monotonic() + 60
        while not (target.exists() and target.read_text()):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert json.loads(target.read_text())["state"] == "canary"


def test_hooks_are_told_of_people_too(proxy: Proxied, tmp_path: Path) -> None:
    """Start, pause, resume, set and roll back, whoever's hand it was; once, also after a restart.

    What was decided while no controller ran is told by the next one; what the controller itself
    decides is not told a second time.
    """
    folder = tmp_path / "told"
    folder.mkdir()
    code = (
        "import json, sys, pathlib; text = sys.stdin.read(); told = json.loads(text);"
        f" pathlib.Path({str(folder)!r}, str(told['at'])).write_text(text)"
    )
    hooks = Hooks(command=(sys.executable, "-c", code))

    def told(number: int) -> list[tuple[str, str, str]]:
        until = time.monotonic() + 60
        while True:
            texts = [file.read_text() for file in sorted(folder.iterdir())]
            if len(texts) >= number and all(texts):
                break
            assert time.monotonic() < until
            time.sleep(0.05)
        found = [json.loads(text) for text in texts]
        return [(event["kind"], event["actor"], event["words"]) for event in found]

    with begun(proxy, POLICY.model_copy(update={"hooks": hooks})) as controller:
        pause_rollout(proxy.state, reason="lunch", actor="page")
        controller.tick()
        resume_rollout(proxy.state, reason="", actor="api")
        move(proxy.state, 10, decision="set", reason="a look", actor="ada")
        controller._store.release(controller._holder)
    move(proxy.state, 0, decision="rollback", reason="enough", actor="ada")
    later = Controller(proxy.state, lambda _: None)
    later.tick()
    later.tick()
    # Of a record that was moved away more may have been told than there is in the new one.
    write_json(proxy.state / FILE, {"entry": 10_000})
    People(proxy.state, lambda _: None).look()
    assert read_json(proxy.state / FILE)["entry"] == Store(proxy.state).log(1)[0].id
    me = getpass.getuser()
    assert told(5) == [
        ("start", me, "test"),
        ("pause", "page", "lunch"),
        ("resume", "api", ""),
        ("set", "ada", "a look"),
        ("rollback", "ada", "enough"),
    ]


def test_nothing_starts_unwatched(proxy: Proxied) -> None:
    """Without a controller, and twice."""
    with pytest.raises(RolloutError, match="up --policy"):
        start_rollout(proxy.state, POLICY, reason="")
    with begun(proxy), pytest.raises(RolloutError, match="under way"):
        start_rollout(proxy.state, POLICY, reason="")


PROBED = POLICY.model_copy(
    update={
        "steps": (Step(weight=0.0, min_seconds=0.0), Step(weight=50, **QUICK)),
        "guards": POLICY.guards.model_copy(
            update={"quality": QualityGuard(), "ttft": LatencyGuard(objective=1.0, margin=0.4)}
        ),
        "probes": Probes(interval_seconds=0.05),
        "blind_seconds": 60.0,
    }
)


def until(proxy: Proxied, controller: Controller, wanted: str) -> None:
    """Tick until that phase, without any request of a user."""
    end = time.monotonic() + 30
    while phase(proxy)[0] != wanted:
        assert time.monotonic() < end, status(proxy.state)["decision"]
        controller.tick()
        time.sleep(0.05)


def test_a_ruined_model_is_rolled_back_before_any_user_meets_it(proxy: Proxied) -> None:
    """Probes alone tell; the record says so in figures and without a word of their texts."""
    proxy.pruned.unlike = 4.0
    with begun(proxy, PROBED) as controller:
        until(proxy, controller, "rolled_back")
        last = Store(proxy.state).history()[0]
        assert (last.actor, last.decision, last.percent_before) == ("controller", "rollback", 0)
        assert last.reason.startswith("quality-")
        assert last.confirmed_at is not None
        told = "".join(p.read_bytes().decode(errors="ignore") for p in proxy.state.glob("*.sq*"))
        assert controller.tick() is None
        assert controller._prober is None
    assert str(proxy.pruned.asked[0]["prompt"])[:20] not in told
    assert proxy.pruned.asked[0]["priority"] == 1000


def test_good_probes_open_the_way_and_are_not_counted_as_users(proxy: Proxied) -> None:
    """Most of 35 asked; forty users' requests later each engine's counts are those forty."""
    with begun(proxy, PROBED) as controller:
        until(proxy, controller, "canary")
        prober = controller._prober
        assert prober is not None
        assert len(prober.quality().results) > 25
        controller.tick()
        ask(proxy, 40)
        prober.stop()
        prober._thread.join(10)
        controller.tick()
        window = controller._window
        assert window is not None
        assert sum(n for _, n in window.shares["truncated"].values()) == 40
        assert sum(n for _, n in window.failures.values()) == 40


def test_results_survive_a_controller_and_a_changed_set_is_not_asked(proxy: Proxied) -> None:
    """The next one goes on; with another file than the rollout began with it says so and waits."""
    texts = proxy.state / "mine.jsonl"
    texts.write_text('{"text": "one text"}\n{"text": "another text"}\n')
    own = PROBED.probes.model_copy(update={"texts": texts, "default": False})
    with begun(proxy, PROBED.model_copy(update={"probes": own})) as controller:
        until(proxy, controller, "canary")
        controller.tick()
        controller._ask_no_more()
        Store(proxy.state).release(controller._holder)
        second = Controller(proxy.state, lambda _: None)
        second.tick()
        assert second._prober is not None
        assert len(second._prober.quality().results) == 2
        second._ask_no_more()
        texts.write_text('{"text": "something else"}\n')
        decision = second.tick()
        assert decision is not None
        kl = next(e for e in decision.evidence if e.guard == "quality-kl")
        assert (kl.verdict, "not those that the rollout began with" in kl.needs) == ("open", True)


def test_probes_give_way_while_requests_wait(proxy: Proxied) -> None:
    """Nine times out of ten; and an engine that does not answer is told in a line without text."""
    told: list[str] = []
    prober = prober_of(PROBED, StackState.load(proxy.state), told.append, None)
    prober.crowded({ORIGINAL: 3.0, PRUNED: 0.0})
    for _ in range(10):
        prober.step()
    assert len(prober.quality().results) == 1
    proxy.pruned.stop()
    prober.crowded({ORIGINAL: 0.0, PRUNED: 0.0})
    with pytest.raises(RolloutError, match=r"pruned engine: no answer to a probe \(ConnectError\)"):
        prober.step()


def test_an_engine_that_hangs_is_rolled_back_by_what_it_does_not_say(proxy: Proxied) -> None:
    """It accepts scrapes and probes and answers none: blind, then back; nothing waits for it."""
    with begun(proxy, PROBED.model_copy(update={"blind_seconds": 2.0})) as controller:
        proxy.pruned.hang()
        decisions = []
        for _ in range(20):
            decision = controller.tick()
            assert decision is not None
            decisions.append((decision.kind, decision.reason))
            if decision.kind != "hold":
                break
        assert decisions[0] == ("hold", "blind")
        assert decisions[-1] in (("rollback", "blind"), ("rollback", "hard"))
        assert Store(proxy.state).history()[0].confirmed_at is not None
