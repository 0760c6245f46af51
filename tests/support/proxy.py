"""A real Envoy in front of two upstreams, with a state directory as ``up`` makes it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_serve.serving import envoy
from moe_serve.serving.listener import Edge, put_listener
from moe_serve.serving.ports import free_port
from moe_serve.serving.process import Child, start
from moe_serve.serving.routes import write_split
from moe_serve.serving.state import EngineState, StackState
from moe_serve.serving.variants import ORIGINAL, PRUNED
from tests.support.upstream import Upstream


@dataclass(frozen=True, kw_only=True)
class Proxied:
    """What a test needs to know."""

    state: Path
    endpoint: str
    admin: envoy.Admin
    original: Upstream
    pruned: Upstream
    child: Child

    @contextmanager
    def again(self) -> Iterator[None]:
        """Another Envoy with the same configuration, after the first has ended."""
        child = _envoy(self.state, self.admin)
        try:
            yield
        finally:
            child.stop(5)


def _envoy(state: Path, admin: envoy.Admin) -> Child:
    """Start it, and wait until it serves."""
    child = start("envoy", envoy.command(state / "envoy.json"), state / "envoy.log")
    until = time.monotonic() + 30
    while not admin.ready():
        assert child.exit_code is None, child.tail()
        assert time.monotonic() < until, child.tail()
        time.sleep(0.05)
    return child


@contextmanager
def proxied(
    state: Path,
    *,
    chunks: int = 20,
    pause: float = 0.05,
    model: Path | None = None,
    served_model: str = ORIGINAL,
    **settings: Any,
) -> Iterator[Proxied]:
    """Start two upstreams and Envoy; everything on the original.

    With a ``model`` whose files both are said to serve, its control process can be had as well;
    ``settings`` are the edge's.
    """
    ports = {ORIGINAL: free_port(), PRUNED: free_port()}
    port, admin_port = free_port(), free_port()
    write_split(state, 0.0)
    edge = Edge(port=port, **settings)
    put_listener(state, edge)
    config = envoy.bootstrap(
        state,
        edge,
        admin_port=admin_port,
        engines={name: f"127.0.0.1:{at}" for name, at in ports.items()},
    )
    (state / "envoy.json").write_text(json.dumps(config))
    with (
        Upstream(ORIGINAL, ports[ORIGINAL], chunks=chunks, pause=pause) as original,
        Upstream(PRUNED, ports[PRUNED], chunks=chunks, pause=pause) as pruned,
    ):
        admin = envoy.Admin(f"127.0.0.1:{admin_port}")
        child = _envoy(state, admin)
        try:
            scheme = "https" if edge.certificate else "http"
            endpoint = f"{scheme}://127.0.0.1:{port}/v1"
            StackState(
                pid=child.pid,
                endpoint=endpoint,
                control="http://127.0.0.1:1",
                admin=f"127.0.0.1:{admin_port}",
                envoy_pid=child.pid,
                served_model=served_model,
                edge=edge,
                engines={
                    name: EngineState(
                        url=f"http://127.0.0.1:{p}", pid=child.pid, model=str(model), log="none"
                    )
                    for name, p in ports.items()
                },
            ).save(state)
            yield Proxied(
                state=state,
                endpoint=endpoint,
                admin=admin,
                original=original,
                pruned=pruned,
                child=child,
            )
        finally:
            child.stop(5)
