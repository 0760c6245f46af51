"""The control process itself."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from benchmarks.fixtures import MODEL
from moe_serve.rollout import connections
from moe_serve.rollout.control import application
from moe_serve.rollout.store import Store
from moe_serve.serving.config import StackConfig
from moe_serve.serving.ports import free_port
from moe_serve.serving.routes import write_split
from moe_serve.serving.state import EngineState, StackState
from tests.support.control import serving
from tests.support.stacks import LOOPBACKS, fake_stack
from tests.support.threaded import Threaded


def until(found: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("host", LOOPBACKS)
def test_sigterm_ends_streams_and_gives_the_lease_back(host: str, tmp_path: Path) -> None:
    """So that the next controller need not wait for the old one's lease to run out."""
    fake_stack(tmp_path, MODEL)
    write_split(tmp_path, 3)
    port, store = free_port(), Store(tmp_path)
    command = [sys.executable, "-m", "moe_serve.rollout.control", "--watch", "--host", host]
    process = subprocess.Popen([*command, "--state", str(tmp_path), "--port", str(port)])
    folder = Path()
    url = StackConfig(
        original=folder, pruned=folder, control_host=host, control_port=port
    ).control_url
    try:
        until(lambda: store.lease_holder() is not None)

        def answers() -> bool:
            try:
                return httpx.get(f"{url}/healthz").status_code == 200
            except httpx.TransportError:
                return False

        until(answers)
        with httpx.stream("GET", f"{url}/api/events") as stream:
            assert next(stream.iter_lines()) == "event: status"
            process.terminate()
            assert process.wait(30) == 0
        assert store.lease_holder() is None
    finally:
        process.kill()


def test_who_never_finishes_a_request_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 half requests, more than connections are allowed: the page answers, and they are ended.

    Those that came first make room at once, the others go when their time is up.
    """
    monkeypatch.setattr(connections, "_HEADERS_SECONDS", 2.0)
    fake_stack(tmp_path, MODEL)
    write_split(tmp_path, 3)
    with serving(tmp_path) as address, ExitStack() as stack:
        port = int(address.rpartition(":")[2])
        slow = []
        for number in range(300):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            one.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n")
            slow.append(one)
            if number % 50 == 49:
                assert httpx.get(f"{address}/healthz", timeout=60).status_code == 200
        for one in slow:
            with suppress(ConnectionResetError):
                assert one.recv(1) == b""
        again = httpx.Client(base_url=address)
        assert [again.get("/healthz").status_code for _ in range(3)] == [200, 200, 200]
        again.close()


def test_engines_pages_come_over_one_connection(tmp_path: Path) -> None:
    """Status and all; a client made for each page costs 27 ms of processor, and a connection."""
    callers: list[int] = []

    async def page(request: Request) -> Response:
        callers.append(request.client.port if request.client else 0)
        return Response("told 1\n", 200 if len(callers) == 1 else 503, media_type="text/plain")

    fake_stack(tmp_path, MODEL)
    write_split(tmp_path, 3)
    stack, port = StackState.load(tmp_path), free_port()
    engine = EngineState(url=f"http://127.0.0.1:{port}", model=str(MODEL))
    replace(stack, engines={"pruned": engine}).save(tmp_path)
    client = TestClient(application(tmp_path), base_url="http://localhost")
    with Threaded([Route("/metrics", page)], port):
        told = [client.get("/engines/pruned/metrics") for _ in range(2)]
    assert [(t.status_code, t.text) for t in told] == [(200, "told 1\n"), (503, "told 1\n")]
    assert len(callers) == 2
    assert len(set(callers)) == 1
    assert client.get("/engines/pruned/metrics").status_code == 502
    assert client.get("/engines/original/metrics").status_code == 404
