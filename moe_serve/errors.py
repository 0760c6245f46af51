"""Everything that can go wrong, as one tree.

::

    MoeServeError
    ├ UsageError               the options contradict each other or the input cannot be used
    ├ CheckpointError          the files are not what their index, header or manifest says
    │ ├ IncompleteCheckpoint   a shard or tensor is missing, truncated or unaccounted for
    │ └ UnsupportedFamily      no row of the family table fits this configuration
    ├ CalibrationError         texts or activations that cannot be calibrated on
    ├ PlanError                the request cannot be met; nothing was written
    ├ OutputError              the output cannot be written, or belongs to another run
    ├ ServingError             an engine, the proxy or the stack did not start or stopped
    └ RolloutError             traffic could not be moved as asked
      └ Overtaken              someone else acted first

Foreign exceptions are translated once, where they enter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class MoeServeError(Exception):
    """What happened, where, and what to do about it.

    Args:
        what: one sentence, no trailing full stop needed.
        where: the file, tensor, layer, expert or option concerned.
        remedy: what the reader can do now.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        """One line: ``where: what; remedy``."""
        line = f"{self.where}: {self.what}" if self.where else self.what
        return f"{line}; {self.remedy}" if self.remedy else line

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the keyword arguments across process boundaries."""
        return (_rebuild, (type(self), self.what, self.where, self.remedy))


def _rebuild(
    kind: type[MoeServeError], what: str, where: str | None, remedy: str | None
) -> MoeServeError:
    return kind(what, where=where, remedy=remedy)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Whatever goes wrong within, without naming a place, happened here."""
    try:
        yield
    except MoeServeError as exc:
        exc.where = exc.where or where
        raise


@contextmanager
def within(folder: Path) -> Iterator[None]:
    """A place that is named by itself, a file or a tensor, is one of this folder."""
    try:
        yield
    except MoeServeError as exc:
        if exc.where and not exc.where.startswith(str(folder)):
            exc.where = f"{folder}: {exc.where}"
        raise


class UsageError(MoeServeError):
    """The options contradict each other or the input cannot be used."""


def require_positive(bounds: Mapping[str, int | None], least: int = 1) -> None:
    """Option → its value, ``None`` where it is left out.

    Raises:
        UsageError: naming the first that is less than ``least``.
    """
    for option, value in bounds.items():
        if value is not None and value < least:
            raise UsageError(f"is {value}", where=option, remedy=f"give {least} or more")


class CheckpointError(MoeServeError):
    """The files are not what their index, header or manifest says."""


class IncompleteCheckpoint(CheckpointError):
    """A shard or tensor is missing, truncated or unaccounted for."""


class UnsupportedFamily(CheckpointError):
    """No row of the family table fits this configuration."""


class CalibrationError(MoeServeError):
    """Texts or activations that cannot be calibrated on."""


class PlanError(MoeServeError):
    """The request cannot be met; nothing was written."""


class OutputError(MoeServeError):
    """The output cannot be written, or belongs to another run."""


class ServingError(MoeServeError):
    """An engine, the proxy or the stack did not start or stopped."""


class RolloutError(MoeServeError):
    """Traffic could not be moved as asked."""


class Overtaken(RolloutError):
    """Someone else acted first; what was decided rests on what no longer holds."""
