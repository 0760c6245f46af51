"""Messages and exit codes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

from moe_serve.errors import PlanError


def test_a_message_has_place_fault_and_remedy() -> None:
    """In this order, on one line."""
    error = PlanError("is too small", where="--keep", remedy="keep more")
    assert str(error) == "--keep: is too small; keep more"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own


def test_errors_become_exit_codes(tmp_path: Path) -> None:
    """Exit 2, one line on stderr, nothing on stdout."""
    command = [sys.executable, "-m", "moe_serve", "inspect", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error:" in done.stderr
    assert "give the folder that holds config.json" in done.stderr


def test_rolling_back_does_not_import_torch() -> None:
    """The fastest command must not wait for the slowest library."""
    code = (
        "import sys; import moe_serve.cli.app, moe_serve.cli.rollout; "
        "heavy = {'torch', 'transformers', 'vllm', 'pydantic'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_demo_says_where_its_model_is(tmp_path: Path) -> None:
    """A package that was installed holds none."""
    command = [sys.executable, "-m", "moe_serve", "demo", "--model", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "run scripts/demo in a checkout" in " ".join(done.stderr.split())
