"""Child processes with logs, and their ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_TAIL: Final = 12
_TAIL_BYTES: Final = 64 * 1024
"""The most that is read for it: logs of a stack that runs for months are larger than memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """A started process that writes into a log file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Process id, also of its group."""
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """``None`` while it runs."""
        return self.process.poll()

    def tail(self) -> str:
        """The last lines of its log."""
        with suppress(OSError), self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            end = log.read(_TAIL_BYTES).decode(errors="replace")
            return "\n".join(end.splitlines()[-_TAIL:])
        return ""

    def stop(self, grace: float) -> None:
        """SIGTERM to its group, SIGKILL after ``grace`` seconds."""
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()
        # Whatever the leader left behind in its group.
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def start(
    name: str,
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    *,
    yielding: bool = False,
    grace: float = 20.0,
) -> Child:
    """Start a command in its own group; it ends when this process does.

    Args:
        name: for messages.
        command: what to run.
        log: file for its output.
        environment: variables to add.
        yielding: leave the processor to the others when they want it.
        grace: seconds it has to end by itself after this process was killed.
    """
    options = [f"--grace={grace:g}", *(["--yield"] if yielding else [])]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moe_serve.serving.guard", *options, "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    return Child(name=name, process=process, log=log)
