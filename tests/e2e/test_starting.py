"""Stacks that do not come up say why."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

from benchmarks.fixtures import MODEL
from tests.support.running import command


def test_a_failing_engine_is_named_with_its_log(tmp_path: Path) -> None:
    """A pruned model with a damaged table: which part, and its own words."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in MODEL.iterdir():
        os.link(file, broken / file.name) if file.name != "config.json" else None
    config = json.loads((MODEL / "config.json").read_text())
    config["architectures"] = ["CompactQwen3MoeForCausalLM"]
    config["compact_experts"] = {"version": 1, "layers": {"0": {"width": 1}}}
    (broken / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        command(MODEL, broken, tmp_path / "state"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert "error: pruned engine: ended with exit code" in done.stderr
    assert "layer 0: malformed entry" in (tmp_path / "state/logs/pruned.log").read_text()


def test_a_taken_port_is_said_at_once(tmp_path: Path) -> None:
    """Before an engine is started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            command(MODEL, MODEL, tmp_path / "state", "--port", port),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert f"port {port} is taken" in done.stderr
