"""Who has the state directory, and who has its keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from moe_serve.errors import OutputError, ServingError
from moe_serve.serving import locks
from moe_serve.serving.locks import KEYS, UP, hold_stack, is_up, keys_lock


def test_a_state_directory_has_one_stack(tmp_path: Path) -> None:
    """The next is told who has it; an older holder's longer number leaves no digits behind."""
    (tmp_path / UP).write_text("123456789012\n")
    assert not is_up(tmp_path)
    with hold_stack(tmp_path):
        assert (tmp_path / UP).read_text() == f"{os.getpid()}\n"
        assert is_up(tmp_path)
        words = rf"{tmp_path}: another moe-serve up \(process {os.getpid()}\) .*; stop it first"
        with pytest.raises(ServingError, match=words):
            hold_stack(tmp_path)
    assert not is_up(tmp_path)


def test_a_directory_that_never_had_one(tmp_path: Path) -> None:
    """Is free; one that isn't there can't be had."""
    assert not is_up(tmp_path)
    with pytest.raises(OutputError, match=r"up\.lock: cannot be written"):
        hold_stack(tmp_path / "none")


def test_it_is_free_when_its_holder_is_killed(tmp_path: Path) -> None:
    """At once, while what the holder started still lives: the lock is not passed on."""
    stubborn = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); "
        "time.sleep(60)"
    )
    script = (
        "import time\nfrom pathlib import Path\n"
        "from moe_serve.serving.locks import hold_stack\n"
        "from moe_serve.serving.process import start\n"
        f"state = Path({str(tmp_path)!r})\nheld = hold_stack(state)\n"
        f"child = start('c', {(sys.executable, '-c', stubborn)!r}, state / 'log', grace=30.0)\n"
        "while not (state / 'log').read_text(): time.sleep(0.02)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = psutil.Process(int(holder.stdout.readline()))
    family = [child, *child.children(recursive=True)]
    try:
        with pytest.raises(ServingError, match=rf"\(process {holder.pid}\)"):
            hold_stack(tmp_path)
        holder.kill()
        holder.wait()
        hold_stack(tmp_path).close()
        assert child.is_running()
        assert child.status() != psutil.STATUS_ZOMBIE
    finally:
        holder.kill()
        for process in family:
            process.kill()


def test_keys_are_waited_for_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is made: keys may be there before the first stack."""
    monkeypatch.setattr(locks, "_PATIENCE", 0.05)
    state = tmp_path / "state"
    with keys_lock(state), pytest.raises(ServingError, match=KEYS), keys_lock(state):
        raise AssertionError
    with keys_lock(state):
        pass
