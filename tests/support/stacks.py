"""A state directory without processes."""

from __future__ import annotations

from pathlib import Path

from moe_serve.serving.process import free_port
from moe_serve.serving.state import EngineState, StackState
from moe_serve.serving.token import make_token


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
