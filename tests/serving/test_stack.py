"""A stack on this machine, with engines that run elsewhere: real Envoy, real control process."""

from __future__ import annotations

import errno
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from benchmarks.fixtures import MODEL
from moe_serve.errors import ServingError
from moe_serve.serving import stack as module
from moe_serve.serving.config import StackConfig
from moe_serve.serving.listener import listener_file
from moe_serve.serving.locks import hold_stack
from moe_serve.serving.ports import free_port
from moe_serve.serving.process import start
from moe_serve.serving.stack import Stack, bring_up
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.upstream import Upstream


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """Brought up, and stopped at the end."""
    ports = {name: free_port() for name in (ORIGINAL, PRUNED)}
    with Upstream(ORIGINAL, ports[ORIGINAL]), Upstream(PRUNED, ports[PRUNED]):
        found = bring_up(
            StackConfig(
                original=MODEL,
                pruned=MODEL,
                original_url=f"http://127.0.0.1:{ports[ORIGINAL]}",
                pruned_url=f"http://127.0.0.1:{ports[PRUNED]}",
                state=tmp_path / "state",
                port=free_port(),
                control_port=free_port(),
            ),
            lambda _text: None,
        )
        yield found
        found.stop()


def test_a_control_process_that_ended_is_started_again(stack: Stack) -> None:
    """Once, with its log gone on with; not at once again when that one ends too."""
    told: list[str] = []
    assert not stack.revive(told.append)
    control = next(c for c in stack.children if c.name == "control")
    os.kill(control.pid, signal.SIGKILL)
    until = time.monotonic() + 30
    while not stack.revive(told.append):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(told) == 1
    again = next(c for c in stack.children if c.name == "control")
    assert (again.pid != control.pid, again.log) == (True, control.log)
    while True:
        assert time.monotonic() < until + 60, again.tail()
        with suppress(httpx.HTTPError):
            if httpx.get(f"{stack.config.control_url}/healthz").text == "ok":
                break
        time.sleep(0.1)
    os.kill(again.pid, signal.SIGKILL)
    again.process.wait(10)
    assert not stack.revive(told.append)


def test_a_second_stack_in_the_same_directory_is_refused(stack: Stack) -> None:
    """Before it writes anything: the first one's proxy stays on its port."""
    watched = [listener_file(stack.folder), *(stack.folder / "logs").iterdir()]
    before = {path: path.stat().st_ino for path in watched}
    other = stack.config.model_copy(update={"port": free_port(), "control_port": free_port()})
    with pytest.raises(ServingError, match=rf"another moe-serve up \(process {os.getpid()}\) runs"):
        bring_up(other, lambda _text: None)
    assert {path: path.stat().st_ino for path in watched} == before
    health = f"http://127.0.0.1:{stack.config.port}/health"
    assert httpx.get(health).status_code == 200
    stack.stop()
    hold_stack(stack.folder).close()


def test_a_stack_that_did_not_start_leaves_the_directory_free(tmp_path: Path) -> None:
    """Its port is taken, say."""
    port = free_port()
    config = StackConfig(original=MODEL, pruned=MODEL, state=tmp_path, port=port, control_port=port)
    with Upstream(ORIGINAL, port), pytest.raises(ServingError, match="is taken"):
        bring_up(config, lambda _text: None)
    hold_stack(tmp_path).close()


def test_what_passes_does_not_end_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file or process is to be had: that is said, and tried again after the pause."""
    log = tmp_path / "control.log"
    ended = start("control", ["false"], log)
    ended.process.wait(20)
    config = StackConfig(original=MODEL, pruned=MODEL, state=tmp_path)
    stack = Stack(config=config, folder=tmp_path, children=[ended])

    def refused(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "start", refused)
        for _ in range(2):
            assert not stack.revive(told.append)
    assert len(told) == 1
    assert "Too many open files); tried again in 10 s" in told[0]
    monkeypatch.setattr(module, "_command", lambda _: ["true"])
    stack._revived = -math.inf
    assert stack.revive(told.append)
    assert "started again" in told[1]
    stack.stop()
