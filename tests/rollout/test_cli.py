"""The commands, as a person types them."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from moe_serve.rollout.state import State
from moe_serve.rollout.store import DATABASE, Store
from moe_serve.rollout.traffic import move
from moe_serve.serving.routes import write_split
from tests.support.stacks import fake_stack

POLICY = '{"steps": [{"weight": 1}]}'


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``moe-serve rollout ...``."""
    command = [sys.executable, "-m", "moe_serve", "rollout", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def stack(tmp_path: Path, phase: Any = "canary") -> str:
    """A state directory with a rollout under way and nobody alive."""
    fake_stack(tmp_path)
    write_split(tmp_path, 0)
    move(tmp_path, 5, decision="set", reason="")
    Store(tmp_path).note("prepared", {}, state=State(phase=phase, began=1.0), policy=POLICY)
    return str(tmp_path)


def test_a_rollout_is_paused_resumed_and_rolled_back_with_nobody_alive(tmp_path: Path) -> None:
    """The store and the file are enough; the record verifies."""
    state = stack(tmp_path)
    assert run("pause", "--state", state, "--reason", "lunch").returncode == 0
    found = json.loads(run("status", "--state", state, "--json").stdout)
    assert (found["state"], found["pruned_percent"], found["controller"]) == ("paused", 5, None)
    assert "lunch" in found["reason"]
    # The policy's first step is 1 %, the file says 5.
    moved = json.loads(run("resume", "--state", state, "--json").stdout)
    assert moved["pruned_percent"] == 1
    assert run("rollback", "--state", state).returncode == 0
    found = json.loads(run("status", "--state", state, "--json").stdout)
    assert (found["state"], found["pruned_percent"]) == ("rolled_back", 0)
    checked = run("history", "--verify", "--json", "--state", state)
    assert checked.returncode == 0
    assert json.loads(checked.stdout)["problems"] == []


def test_history_says_who_moved_what_and_why(tmp_path: Path) -> None:
    """A guard's words name it, its interval and its margin; a person's are a person's."""
    state = stack(tmp_path)
    words = "errors: 9 of 100, original 1 of 100: +0.0100 to +0.1200, margin 0.005 [original]"
    move(tmp_path, 0, decision="rollback", reason=words, actor="controller")
    move(tmp_path, 5, decision="set", reason="once more", actor="ada")
    told = run("history", "--state", state).stdout.splitlines()
    assert [line.strip() for line in told if line.startswith("    ")] == ["once more", words]
    assert ("ada" in told[0], "controller" in told[2]) == (True, True)


def test_a_tampered_record_fails_the_check(tmp_path: Path) -> None:
    """Exit 1, with what is wrong."""
    state = stack(tmp_path)
    with sqlite3.connect(tmp_path / DATABASE) as db:
        db.execute("UPDATE changes SET actor = 'nobody'")
    db.close()
    found = run("history", "--verify", "--state", state)
    assert found.returncode == 1
    assert "actor differs from the log" in found.stdout


def test_start_without_a_controller_is_refused(tmp_path: Path) -> None:
    """Exit 2 and the way out."""
    found = run("start", "--state", stack(tmp_path, "idle"))
    assert found.returncode == 2
    assert "moe-serve up --policy" in found.stderr


def test_simulate_prints_both_policies(tmp_path: Path) -> None:
    """From a file, one rollout per scenario."""
    policy = tmp_path / "policy.toml"
    policy.write_text("[[steps]]\nweight = 50\nmin_seconds = 0\nmin_requests = 10\nslack = 4\n")
    found = run("simulate", str(policy), "--rollouts", "1", "--json")
    rows = json.loads(found.stdout)["scenarios"]
    assert {row["policy"] for row in rows} == {"policy", "thresholds"}
    assert all(row["rollouts"] == 1 for row in rows)
