"""The dry run as a command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_serve.cli.app import app
from moe_serve.pruning.auto import LEADERS
from tests.support.models import make_model, write_texts


def test_a_dry_run_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what the run would take; where the disk is too small, that, with exit code 1."""
    model, texts = make_model(tmp_path / "m", "mixtral"), write_texts(tmp_path / "t.jsonl")
    before = sorted(tmp_path.iterdir())
    command = ["prune", str(model), str(tmp_path / "o"), "--keep", "0.5", "--dry-run", "--json"]
    command += ["--calibration", str(texts), "--tokens", "1000"]
    app(command, standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert [step["name"] for step in found["steps"]] == ["calibrate", "plan", "try", "apply"]
    assert found["passes"] == 4 + len(LEADERS)
    assert sorted(tmp_path.iterdir()) == before
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: real._replace(free=1000))
    assert app(command, standalone_mode=False) == 1
    assert "on disk" in json.loads(capsys.readouterr().out)["problems"][0]


def test_healing_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four passes for the drafts, and a longer last step on more disk."""
    model, texts = make_model(tmp_path / "m", "mixtral"), write_texts(tmp_path / "t.jsonl")
    command = ["prune", str(model), str(tmp_path / "o"), "--keep", "0.5", "--dry-run", "--json"]
    command += ["--calibration", str(texts), "--tokens", "1000", "--method", "block-obs"]
    app(command, standalone_mode=False)
    plain = json.loads(capsys.readouterr().out)
    app([*command, "--heal"], standalone_mode=False)
    healed = json.loads(capsys.readouterr().out)
    assert [step["name"] for step in healed["steps"]] == ["calibrate", "plan", "draft", "apply"]
    assert healed["passes"] == plain["passes"] + 4
    assert healed["steps"][-1]["flops"] > 20 * plain["steps"][-1]["flops"]
    assert healed["disk_bytes"] > plain["disk_bytes"]
