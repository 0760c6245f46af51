"""Rolling back while something is broken: the command alone, under load, with the real Envoy."""

from __future__ import annotations

import json
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from moe_serve.demo.clients import Load
from moe_serve.rollout.recovery import recover
from moe_serve.rollout.store import DATABASE, Store
from moe_serve.rollout.traffic import move
from moe_serve.serving.routes import SPARE, read_split
from moe_serve.serving.variants import HEADER, ORIGINAL, PRUNED
from tests.support.proxy import Proxied, proxied


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxied]:
    """Everything on pruned; streams of half a second."""
    with proxied(tmp_path, chunks=10, pause=0.05) as running:
        move(tmp_path, 100, decision="set", reason="")
        yield running


@contextmanager
def locked(proxy: Proxied) -> Iterator[str]:
    """Another program holds the record."""
    db = sqlite3.connect(proxy.state / DATABASE, isolation_level=None)
    db.execute("BEGIN EXCLUSIVE")
    yield ""
    db.execute("ROLLBACK")
    db.close()


@contextmanager
def full(_proxy: Proxied) -> Iterator[str]:
    """No file takes another byte: what a full disk comes to, for the command alone."""
    yield "ulimit -f 0; "


@contextmanager
def nothing(_proxy: Proxied) -> Iterator[str]:
    """All is well, and nobody watches."""
    yield ""


def rollback(proxy: Proxied, before: str = "") -> dict[str, Any]:
    """``moe-serve rollout rollback`` as a person types it."""
    arguments = ["rollout", "rollback", "--state", str(proxy.state), "--json"]
    command = shlex.join([sys.executable, "-m", "moe_serve", *arguments])
    done = subprocess.run(
        ["bash", "-c", f"{before}exec {command}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("broken", [nothing, locked, full])
def test_streams_end_whole_and_new_ones_go_to_the_original(broken: Any, proxy: Proxied) -> None:
    """32 in flight: none fails, none is cut off, and within a tenth of a second it is in force."""
    with Load(endpoint=proxy.endpoint, model="m", streams=32, tokens=10) as load, ExitStack() as at:
        load.phase = "before"
        while proxy.pruned.started < 64:
            time.sleep(0.02)
        moved = rollback(proxy, at.enter_context(broken(proxy)))
        load.phase = "after"
        time.sleep(0.7)
    assert load.failed == 0
    assert load.outcomes["before", PRUNED] >= 32
    assert load.outcomes["after", PRUNED] == 0
    assert load.outcomes["after", ORIGINAL] > 0
    assert moved["effective_seconds"] < 0.1
    # What could not be recorded is noticed afterwards, and nothing else is wrong.
    recover(proxy.state)
    last = Store(proxy.state).history()[0]
    assert (last.decision, last.percent_after) == (
        "rollback" if broken is nothing else "edited",
        0,
    )
    assert Store(proxy.state).verify().problems == ()


def test_the_spare_is_used_once_and_made_anew(proxy: Proxied) -> None:
    """With the next change of the split, under a version of its own."""
    first = rollback(proxy, "ulimit -f 0; ")
    assert any("the spare routes are in force" in warning for warning in first["warnings"])
    assert not (proxy.state / SPARE).exists()
    move(proxy.state, 100, decision="set", reason="")
    assert rollback(proxy, "ulimit -f 0; ")["version"] != first["version"]


def test_a_step_forward_does_not_use_it(proxy: Proxied) -> None:
    """On a full disk traffic can go back, not on."""
    command = shlex.join([sys.executable, "-m", "moe_serve", "rollout", "set", "50"])
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 0; exec {command} --state {proxy.state}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert read_split(proxy.state).percent == 100


def test_envoy_restarted_meanwhile(proxy: Proxied) -> None:
    """It is away when the rollback comes, and comes back with it."""
    proxy.child.stop(0)
    moved = rollback(proxy)
    assert moved["effective_seconds"] is None
    assert any("not confirmed" in warning for warning in moved["warnings"])
    with proxy.again():
        answer = httpx.get(f"{proxy.endpoint}/models")
        assert (answer.status_code, answer.headers[HEADER]) == (200, ORIGINAL)
        assert any("is in force" in line for line in recover(proxy.state))
    assert Store(proxy.state).history()[0].confirmed_at is not None


def test_a_pruned_engine_that_accepts_and_never_answers(proxy: Proxied) -> None:
    """Its own requests are lost; those after the rollback are answered at once."""
    proxy.pruned.hang()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{proxy.endpoint}/completions", json={}, timeout=0.3)
    assert rollback(proxy)["effective_seconds"] < 0.1
    with Load(endpoint=proxy.endpoint, model="m", streams=8, tokens=10) as load:
        time.sleep(0.7)
    assert load.failed == 0
    assert {who for _, who in load.outcomes} == {ORIGINAL}


def test_a_pruned_engine_that_is_gone(proxy: Proxied) -> None:
    """Killed with streams in flight, which are cut; what comes then is answered, all of it."""
    with Load(endpoint=proxy.endpoint, model="m", streams=8, tokens=10) as load:
        load.phase = "before"
        while proxy.pruned.started < 16:
            time.sleep(0.02)
        proxy.pruned.die()
        moved = rollback(proxy)
        load.phase = "after"
        time.sleep(0.7)
    assert moved["effective_seconds"] is not None
    assert {who for when, who in load.outcomes if when == "after"} == {ORIGINAL}
    assert load.failed <= 8


def test_the_same_split_again_is_confirmed_too(proxy: Proxied) -> None:
    """From probes alone to a rollback nothing changes but the version, and Envoy says so."""
    for _ in range(2):
        moved = move(proxy.state, 0, decision="rollback", reason="")
        assert moved.effective_seconds is not None
        assert proxy.admin.route_version() == moved.version
