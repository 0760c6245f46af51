"""Hooks: who decided what, told once, whoever it was."""

from __future__ import annotations

import getpass
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_serve.files import read_json, write_json
from moe_serve.rollout.commands import pause_rollout, resume_rollout
from moe_serve.rollout.controller import Controller
from moe_serve.rollout.people import FILE, People
from moe_serve.rollout.policy import Hooks
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import move
from tests.support.proxy import Proxied, proxied
from tests.support.rollouts import POLICY, ask, begun, phase


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxied]:
    """Envoy and two upstreams that answer at once."""
    with proxied(tmp_path, chunks=1, pause=0.0) as running:
        yield running


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
