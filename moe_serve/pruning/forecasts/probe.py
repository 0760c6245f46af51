"""What this machine does in a second, measured in about one."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from moe_serve.checkpoint.source import Checkpoint
from moe_serve.files import reading, writing
from moe_serve.pruning.forecasts.forecast import Rates

_BYTES: Final = 2**27
_SECONDS: Final = 0.15


def measure(checkpoint: Checkpoint, output: Path, device: torch.device, batch: int) -> Rates:
    """Multiply matrices of an expert's shape, read a piece of a shard, write a piece beside OUT.

    The piece is dropped from the page cache first where the system allows it.
    """
    shape = checkpoint.shape
    rows = max(1, batch * shape.top_k // shape.experts)
    forward = _products(rows, shape.hidden, shape.width, device)
    side = min(shape.width, 2048)
    return Rates(
        flops=forward,
        processor_flops=_products(side, side, side, torch.device("cpu")),
        read=_reading(max(checkpoint.shards, key=lambda file: file.stat().st_size)),
        write=_writing(output),
    )


def _products(rows: int, inner: int, columns: int, device: torch.device) -> float:
    a, b = (torch.ones(shape, device=device) for shape in ((rows, inner), (inner, columns)))

    def multiply() -> None:
        (a @ b).sum().item()

    multiply()
    return 2 * rows * inner * columns / _least(multiply)


def _least(work: Callable[[], None]) -> float:
    """Least seconds of one call among as many as fit the time."""
    least, end = float("inf"), time.perf_counter() + _SECONDS
    while True:
        begin = time.perf_counter()
        work()
        now = time.perf_counter()
        least = min(least, now - begin)
        if now >= end:
            return max(least, 1e-9)


def _reading(file: Path) -> float:
    with reading(file), file.open("rb", buffering=0) as source:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(source.fileno(), 0, _BYTES, os.POSIX_FADV_DONTNEED)
        begin, count = time.perf_counter(), 0
        while count < _BYTES and (data := source.read(2**23)):
            count += len(data)
        return count / max(time.perf_counter() - begin, 1e-9)


def _writing(output: Path) -> float:
    folder = output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    with writing(folder), tempfile.NamedTemporaryFile(dir=folder) as file:
        piece = bytes(2**23)
        begin = time.perf_counter()
        for _ in range(8):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return 8 * len(piece) / max(time.perf_counter() - begin, 1e-9)
