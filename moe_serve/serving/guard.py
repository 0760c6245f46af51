"""``python -m moe_serve.serving.guard [OPTION]… -- COMMAND…``: become a guarded command.

It dies with its parent: a stack that is killed outright must not leave engines behind that hold
the GPU, not even one that hangs and hears no SIGTERM. With ``--yield`` it leaves the processor to
others who want it; ``--grace=S`` sets the seconds it has to end by itself.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_NICE: Final = 10
_GRACE: Final = 20.0
_LAST: Final = 1.0
"""Seconds that what a command started has after it."""


def main() -> None:
    """Ask the kernel for SIGTERM on the parent's death, leave a watcher for what follows, exec."""
    options, command = _split(sys.argv[1:])
    parent = os.getppid()
    theirs, ours = os.pidfd_open(parent), os.pidfd_open(os.getpid())
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent is gone already")
    grace = next((float(o.partition("=")[2]) for o in options if o.startswith("--grace=")), _GRACE)
    if os.fork() == 0:
        _watch(theirs, ours, grace)
        os._exit(0)
    if "--yield" in options:
        _yield_processor()
    os.execvp(command[0], command)  # noqa: S606 - no shell is what we want


def _watch(parent: int, command: int, grace: float) -> None:
    """End the command's whole group at most ``grace`` seconds after the parent.

    Also where the command itself has ended: what it started may have not. Both are known by their
    pidfd, so that another process with the same number is not meant.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    either = select.poll()
    either.register(parent, select.POLLIN)
    either.register(command, select.POLLIN)
    if parent not in [fd for fd, _ in either.poll()]:
        return
    either.unregister(parent)
    either.poll(grace * 1000)
    time.sleep(_LAST)
    os.killpg(0, signal.SIGKILL)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _yield_processor() -> None:
    """Lower the priority of this process and its children.

    Where the kernel groups tasks by session for scheduling (``sched_autogroup_enabled``), a nice
    value counts only within the session; the session has its own (``sched(7)``, "The autogroup
    feature"). Setting it is limited to one in 100 ms per machine.
    """
    os.nice(_NICE)
    for _ in range(5):
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(f"{_NICE}\n")
            return
        time.sleep(0.1)


if __name__ == "__main__":
    main()
