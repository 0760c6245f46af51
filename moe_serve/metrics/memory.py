"""Memory of processes and GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import psutil
import pynvml


def process_tree(pid: int | None) -> list[int]:
    """A process and all it started that still run; ``None``: one on another machine."""
    if pid is None:
        return []
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [pid, *(child.pid for child in root.children(recursive=True))]
    return []


def resident_bytes(pid: int | None) -> int | None:
    """Resident memory of a process tree, ``None`` when it is gone.

    Pages shared between its processes count once per process.
    """
    total, seen = 0, False
    for member in process_tree(pid):
        with suppress(psutil.NoSuchProcess):
            total += psutil.Process(member).memory_info().rss
            seen = True
    return total if seen else None


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReading:
    """One GPU, as the driver sees it."""

    index: int
    uuid: str
    total: int
    used_by_process: dict[int, int]
    """Process id → bytes."""


def read_gpus() -> Iterator[GpuReading]:
    """All NVIDIA GPUs; nothing where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            yield GpuReading(
                index=index,
                uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
                total=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                used_by_process={p.pid: int(p.usedGpuMemory or 0) for p in processes},
            )
    finally:
        pynvml.nvmlShutdown()
