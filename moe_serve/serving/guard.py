"""``python -m moe_serve.serving.guard [--yield] -- COMMAND…``: become a guarded command.

It dies with its parent: a stack that is killed outright must not leave engines behind that hold
the GPU. With ``--yield`` it leaves the processor to others who want it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_NICE: Final = 10


def main() -> None:
    """Ask the kernel for SIGTERM on the parent's death, then exec."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent is gone already")
    options, command = _split(sys.argv[1:])
    if "--yield" in options:
        _yield_processor()
    os.execvp(command[0], command)  # noqa: S606 - no shell is what we want


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
