"""Child processes: priority, logs, and never outliving the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import psutil
import pytest

from moe_serve.serving.process import Child, start

SLEEP = (sys.executable, "-c", "print('here', flush=True); import time; time.sleep(60)")


def wait_for_words(log: Path) -> None:
    """Until the command itself runs."""
    deadline = time.monotonic() + 20
    while not log.exists() or "here" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started(log: Path, command: tuple[str, ...] = SLEEP, *, yielding: bool = False) -> Child:
    """A child that has said its word."""
    child = start("sleeper", command, log, yielding=yielding)
    wait_for_words(log)
    return child


def test_a_yielding_child_has_low_priority_in_every_scheduler_group(tmp_path: Path) -> None:
    """Nice alone counts for nothing between sessions where tasks are grouped by session."""
    ours = os.nice(0)
    for yielding in (False, True):
        child = started(tmp_path / f"{yielding}.log", yielding=yielding)
        try:
            nice = psutil.Process(child.pid).nice()
            assert nice == min(19, ours + 10) if yielding else nice == ours
            group = Path(f"/proc/{child.pid}/autogroup")
            if group.exists():
                assert group.read_text().split()[-1] == ("10" if yielding else "0")
        finally:
            child.stop(5)
        assert child.exit_code == -signal.SIGTERM


def test_a_stubborn_child_is_killed_after_its_grace(tmp_path: Path) -> None:
    """SIGKILL when SIGTERM is ignored."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('here', flush=True); "
    command = (sys.executable, "-c", code + "time.sleep(60)")
    child = started(tmp_path / "log", command)
    child.stop(0.3)
    assert child.exit_code == -signal.SIGKILL


def test_the_end_of_a_large_log_takes_little_memory(tmp_path: Path) -> None:
    """Twelve lines, fewer where they are long, and nothing where there is no log."""
    child = started(tmp_path / "log")
    try:
        with child.log.open("r+b") as log:
            log.truncate(64 * 1024**2)
            log.seek(0, os.SEEK_END)
            log.write(b"\n" + b"\n".join(b"line %d" % i for i in range(20)) + b"\n")
        tracemalloc.start()
        found = child.tail()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found.splitlines() == [f"line {i}" for i in range(8, 20)]
        assert peak < 1024**2
        child.log.write_bytes(b"short \xff")
        assert child.tail() == "short \ufffd"
        child.log.unlink()
        assert child.tail() == ""
    finally:
        child.stop(5)


STUBBORN = "import signal; signal.signal(15, signal.SIG_IGN); "


ORPHANS = (
    "import os, signal, time\nif os.fork() == 0:\n signal.signal(15, signal.SIG_IGN)\n"
    " time.sleep(60)\n"
)


@pytest.mark.parametrize("code", ["", STUBBORN, ORPHANS], ids=["willing", "deaf", "with children"])
def test_a_child_dies_with_its_parent(tmp_path: Path, code: str) -> None:
    """Even when the parent is killed outright, and even one that hears no SIGTERM."""
    sleep = (sys.executable, "-c", code + SLEEP[-1])
    script = (
        "import time\nfrom pathlib import Path\nfrom moe_serve.serving.process import start\n"
        f"child = start('c', {sleep!r}, Path({str(tmp_path / 'log')!r}), grace=0.5)\n"
        "print(child.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    wait_for_words(tmp_path / "log")
    family = [child, *child.children(recursive=True)]
    assert len(family) == (3 if code == ORPHANS else 2), "itself, its own, and the one who watches"
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
