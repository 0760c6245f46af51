"""A stack on this machine, with engines that run elsewhere: real Envoy, real control process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from benchmarks.fixtures import MODEL
from moe_serve.serving.config import StackConfig
from moe_serve.serving.ports import free_port
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
