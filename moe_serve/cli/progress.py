"""Progress on stderr: a bar on a terminal, a line per task otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from moe_serve.cli.output import err
from moe_serve.progress import Progress


class _Bar:
    def __init__(self, rich: RichProgress) -> None:
        self._rich = rich
        self._task: TaskID | None = None

    def start(self, task: str, total: int) -> None:
        self._task = self._rich.add_task(task, total=total)

    def advance(self, steps: int = 1) -> None:
        if self._task is not None:
            self._rich.advance(self._task, steps)


class _Lines:
    """For logs: when a task began, and when it ended."""

    def __init__(self) -> None:
        self._task, self._left, self._began = "", 0, 0.0

    def start(self, task: str, total: int) -> None:
        self._task, self._left, self._began = task, total, time.monotonic()
        err.print(f"{task}: {total} to do", markup=False)

    def advance(self, steps: int = 1) -> None:
        self._left -= steps
        if self._left == 0:
            seconds = time.monotonic() - self._began
            err.print(f"{self._task}: done in {seconds:.1f} s", markup=False)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show progress while the block runs."""
    if not err.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=err) as rich:
        yield _Bar(rich)
