"""Memory of processes and GPUs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

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


def resident_bytes(members: Collection[int]) -> int | None:
    """Resident memory of some processes together, ``None`` when all are gone.

    Pages shared between its processes count once per process.
    """
    total, seen = 0, False
    for member in members:
        with suppress(psutil.NoSuchProcess):
            total += psutil.Process(member).memory_info().rss
            seen = True
    return total if seen else None


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuReading:
    """One GPU, or one instance of a GPU that is partitioned (MIG), as the driver sees it."""

    index: str
    """``0``; of an instance ``0:1``, the GPU's and its own."""
    uuid: str
    total: int
    used_by_process: dict[int, int | None]
    """Process id → bytes; ``None`` where the driver does not say."""

    def used_by(self, members: Collection[int]) -> int | None:
        """Bytes of some processes together; ``None`` where that can't be known.

        In a container the driver may name processes by their number outside: one that runs
        nowhere here could be anybody's.
        """
        own = [size for pid, size in self.used_by_process.items() if pid in members]
        strangers = any(not psutil.pid_exists(pid) for pid in self.used_by_process)
        if None in own or (strangers and not own):
            return None
        return sum(size or 0 for size in own)


def read_gpus() -> Iterator[GpuReading]:
    """All NVIDIA GPUs, a partitioned one by its instances; nothing where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            # One that has fallen off the bus hides none of the others.
            with suppress(pynvml.NVMLError):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                instances = list(_instances(handle))
                if not instances:
                    yield _reading(str(index), handle)
                for number, instance in instances:
                    yield _reading(f"{index}:{number}", instance)
    finally:
        pynvml.nvmlShutdown()


def _instances(handle: Any) -> Iterator[tuple[int, Any]]:
    """Number and handle of each MIG instance; none where the GPU is whole."""
    with suppress(pynvml.NVMLError_NotSupported):
        present, _after_reset = pynvml.nvmlDeviceGetMigMode(handle)
        if present != pynvml.NVML_DEVICE_MIG_ENABLE:
            return
        for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            # Instances are numbered with gaps.
            with suppress(pynvml.NVMLError_NotFound):
                yield number, pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)


def _reading(index: str, handle: Any) -> GpuReading:
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return GpuReading(
        index=index,
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        total=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        used_by_process={
            p.pid: None if p.usedGpuMemory is None else int(p.usedGpuMemory) for p in processes
        },
    )
