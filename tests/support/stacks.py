"""A state directory without processes."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

from moe_serve.serving.ports import free_port
from moe_serve.serving.state import EngineState, StackState
from moe_serve.serving.token import make_token


def _loopbacks() -> list[str]:
    """That of IPv6 only where this machine has one."""
    found = ["127.0.0.1"]
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        found.append("::1")
    return found


LOOPBACKS = _loopbacks()
"""Addresses that only this machine reaches."""


def fake_stack(state: Path, model: Path | None = None) -> None:
    """A state directory whose processes are gone; both engines served ``model``."""
    engine = EngineState(url="http://127.0.0.1:1", pid=2**22, model=str(model), log="l")
    StackState(
        pid=1,
        endpoint="e",
        control="c",
        admin=f"127.0.0.1:{free_port()}",
        envoy_pid=1,
        served_model="m",
        engines={"original": engine, "pruned": engine},
    ).save(state)
    make_token(state)
