"""Reading tensors before they are asked for, so that disk and processor work at the same time."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from moe_serve.checkpoint.header import TensorEntry
from moe_serve.errors import IncompleteCheckpoint
from moe_serve.files import reading


def read_entry(entry: TensorEntry) -> bytearray:
    """One tensor's bytes, unchanged.

    Raises:
        IncompleteCheckpoint: the file ends inside the tensor.
        CheckpointError: the file can't be read.
    """
    buffer = bytearray(entry.size)
    with reading(entry.file), entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        view = memoryview(buffer)
        while view:
            count = file.readinto(view)
            if not count:
                raise IncompleteCheckpoint(
                    f"ends inside tensor {entry.name!r}",
                    where=str(entry.file),
                    remedy="fetch this file again",
                )
            view = view[count:]
    return buffer


class ReadAhead:
    """A thread that reads what will be wanted next. Memory: those tensors as they are stored."""

    def __init__(self) -> None:
        """No thread before it is needed."""
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[str, Future[bytearray]] = {}

    def begin(self, entries: Iterable[TensorEntry]) -> None:
        """Read these in order; forget what nobody took."""
        for future in self._coming.values():
            future.cancel()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._coming = {entry.name: self._pool.submit(read_entry, entry) for entry in entries}

    def take(self, name: str) -> bytearray | None:
        """A tensor that was begun, waiting for it; each can be taken once.

        Raises:
            CheckpointError: as reading it said.
        """
        future = self._coming.pop(name, None)
        return future.result() if future is not None else None
