"""The control process's application in a thread, behind a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_serve.rollout.access import Bound
from moe_serve.rollout.control import application, server
from moe_serve.serving.ports import free_port
from moe_serve.serving.token import make_token


@contextmanager
def serving(state: Path, bound: Bound | None = None) -> Iterator[str]:
    """Its address, until left."""
    make_token(state)
    port = free_port()
    running = server(application(state, bound), "127.0.0.1", port)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not running.started:
        assert thread.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        running.should_exit = True
        thread.join(10)
