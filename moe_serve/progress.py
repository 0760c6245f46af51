"""How long work tells whoever waits; the caller decides how it is shown."""

from __future__ import annotations

from typing import Final, Protocol


class Progress(Protocol):
    """A sink for steps of known number."""

    def start(self, task: str, total: int) -> None:
        """A task of ``total`` steps begins; it replaces the one before."""

    def advance(self, steps: int = 1) -> None:
        """Steps of the current task are done."""


class Silent:
    """Shows nothing; what a program that calls gets unless it says otherwise."""

    def start(self, task: str, total: int) -> None:
        """Ignore."""

    def advance(self, steps: int = 1) -> None:
        """Ignore."""


SILENT: Final = Silent()
