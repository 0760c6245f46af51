"""The record of changes, without a stack."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_serve.errors import RolloutError
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import move, status
from moe_serve.serving.routes import read_split, route_file, write_split
from tests.support.stacks import fake_stack


def test_intent_comes_before_confirmation(tmp_path: Path) -> None:
    """A change that nobody confirmed is on record as such."""
    store = Store(tmp_path)
    change = store.intend(
        actor="a", decision="set", reason="r", before=0.0, after=5.0, version="v1"
    )
    assert store.history()[0].confirmed_at is None
    store.written(change)
    store.confirmed(change)
    found = store.history()[0]
    assert (found.version, found.percent_after, found.actor) == ("v1", 5.0, "a")
    assert found.confirmed_at is not None


def test_traffic_moves_on_disk_while_envoy_is_away(tmp_path: Path) -> None:
    """The file is written, the warning says that nobody confirmed it."""
    fake_stack(tmp_path)
    write_split(tmp_path, 40)
    moved = move(tmp_path, 0, decision="rollback", reason="fire")
    assert read_split(tmp_path).percent == 0
    assert moved.before == 40
    assert moved.effective_seconds is None
    assert any("not confirmed" in w for w in moved.warnings)
    assert status(tmp_path)["in_force"] is None
    last = Store(tmp_path).history()[0]
    assert (last.decision, last.reason, last.confirmed_at) == ("rollback", "fire", None)


def test_a_rollback_needs_no_name_and_no_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container without this user, and a reason typed in another encoding than the terminal's."""

    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr("getpass.getuser", unknown)
    fake_stack(tmp_path)
    write_split(tmp_path, 40)
    move(tmp_path, 0, decision="rollback", reason="slow \udc8e")
    assert read_split(tmp_path).percent == 0
    last = Store(tmp_path).history()[0]
    assert (last.actor, last.reason) == (f"uid {os.getuid()}", "slow ?")


def test_whatever_fails_in_the_record_a_rollback_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step forward does not: it needs its record."""

    def broken(*_: object, **__: object) -> int:
        raise ValueError("no such thing")

    monkeypatch.setattr(Store, "intend", broken)
    fake_stack(tmp_path)
    write_split(tmp_path, 40)
    with pytest.raises(ValueError, match="no such thing"):
        move(tmp_path, 50, decision="set", reason="")
    moved = move(tmp_path, 0, decision="rollback", reason="")
    assert read_split(tmp_path).percent == 0
    assert any("not recorded: ValueError" in warning for warning in moved.warnings)


def test_a_damaged_route_file_does_not_stop_a_rollback(tmp_path: Path) -> None:
    """Rolling back needs no knowledge of what was before."""
    fake_stack(tmp_path)
    write_split(tmp_path, 40)
    route_file(tmp_path).write_text("{")
    moved = move(tmp_path, 0, decision="rollback", reason="")
    assert moved.before is None
    assert read_split(tmp_path).percent == 0


@pytest.mark.parametrize("percent", [-1.0, 100.5, float("nan")])
def test_impossible_shares_are_refused(percent: float, tmp_path: Path) -> None:
    """The old split stays."""
    fake_stack(tmp_path)
    write_split(tmp_path, 40)
    with pytest.raises(RolloutError, match="share between 0 and 100"):
        move(tmp_path, percent, decision="set", reason="")
    assert read_split(tmp_path).percent == 40


def test_no_stack_is_said(tmp_path: Path) -> None:
    """With the option that would name one."""
    with pytest.raises(RolloutError, match="--state directory of a running moe-serve up"):
        move(tmp_path, 0, decision="rollback", reason="")
