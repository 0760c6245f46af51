"""The control process itself."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from benchmarks.fixtures import MODEL
from moe_serve.rollout.store import Store
from moe_serve.serving.process import free_port
from moe_serve.serving.routes import write_split
from tests.support.stacks import fake_stack


def until(found: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_sigterm_ends_streams_and_gives_the_lease_back(tmp_path: Path) -> None:
    """So that the next controller need not wait for the old one's lease to run out."""
    fake_stack(tmp_path, MODEL)
    write_split(tmp_path, 3)
    port, store = free_port(), Store(tmp_path)
    command = [sys.executable, "-m", "moe_serve.rollout.control", "--watch"]
    process = subprocess.Popen([*command, "--state", str(tmp_path), "--port", str(port)])
    try:
        until(lambda: store.lease_holder() is not None)

        def answers() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
            except httpx.TransportError:
                return False

        until(answers)
        with httpx.stream("GET", f"http://127.0.0.1:{port}/api/events") as stream:
            assert next(stream.iter_lines()) == "event: status"
            process.terminate()
            assert process.wait(30) == 0
        assert store.lease_holder() is None
    finally:
        process.kill()
