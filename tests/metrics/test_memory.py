"""GPU memory by process tree, on NVML's answers for machines that are not here.

What NVML answers is written down as its documentation and ``nvidia-smi`` give it: two whole GPUs
with a tensor-parallel engine on both, one partitioned in two, one that has fallen off the bus.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Final

import psutil
import pynvml
import pytest

from moe_serve.metrics.memory import GpuReading, process_tree, read_gpus

GIB: Final = 1024**3
OUTSIDE: Final = 2**22 - 7
"""A process that is not of this machine's view."""


class Driver:
    """NVML's functions over a table of GPUs; a handle is a row."""

    def __init__(self, *gpus: dict[str, Any]) -> None:
        self.gpus, self.open = gpus, 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """In place of the library's."""
        answers: dict[str, Callable[..., Any]] = {
            "Init": lambda: self._opened(1),
            "Shutdown": lambda: self._opened(-1),
            "DeviceGetCount": lambda: len(self.gpus),
            "DeviceGetHandleByIndex": self._gpu,
            "DeviceGetMigMode": self._partitioned,
            "DeviceGetMaxMigDeviceCount": lambda _: 7,
            "DeviceGetMigDeviceHandleByIndex": self._instance,
            "DeviceGetUUID": lambda handle: handle["uuid"],
            "DeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=handle["total"]),
            "DeviceGetComputeRunningProcesses": lambda handle: [
                SimpleNamespace(pid=pid, usedGpuMemory=size)
                for pid, size in handle["processes"].items()
            ],
        }
        for name, answer in answers.items():
            patch.setattr(pynvml, f"nvml{name}", answer)

    def _opened(self, more: int) -> None:
        self.open += more

    def _gpu(self, index: int) -> dict[str, Any]:
        if self.gpus[index].get("lost"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return self.gpus[index]

    @staticmethod
    def _partitioned(handle: dict[str, Any]) -> list[int]:
        if "instances" not in handle:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(bool(handle["instances"])), 1]

    @staticmethod
    def _instance(handle: dict[str, Any], number: int) -> dict[str, Any]:
        if number not in handle["instances"]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        found: dict[str, Any] = handle["instances"][number]
        return found


@pytest.fixture
def engine() -> Iterator[tuple[int, list[int]]]:
    """A process with a child and a grandchild: the API server, the engine's core, a worker."""
    inner = (
        "import subprocess,sys;subprocess.run([sys.executable,'-c','import time;time.sleep(99)'])"
    )
    outer = f"import subprocess,sys;subprocess.run([sys.executable,'-c',{inner!r}])"
    child = subprocess.Popen([sys.executable, "-c", outer])
    root = psutil.Process(child.pid)
    try:
        while len(family := root.children(recursive=True)) < 2:
            assert child.poll() is None
        yield child.pid, [process.pid for process in family]
    finally:
        for process in [*root.children(recursive=True), root]:
            process.kill()
        child.wait()


def test_memory_is_attributed_by_process_tree(
    engine: tuple[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers on two GPUs are one variant's; this test's own process is another's."""
    root, (core, worker) = engine
    driver = Driver(
        {"uuid": "GPU-a", "total": 80 * GIB, "processes": {core: 30 * GIB, os.getpid(): 5 * GIB}},
        {"uuid": "GPU-b", "total": 80 * GIB, "processes": {worker: 31 * GIB}},
    )
    driver.install(monkeypatch)
    found = list(read_gpus())
    assert [(gpu.index, gpu.uuid, gpu.total) for gpu in found] == [
        ("0", "GPU-a", 80 * GIB),
        ("1", "GPU-b", 80 * GIB),
    ]
    tree = set(process_tree(root))
    assert [gpu.used_by(tree) for gpu in found] == [30 * GIB, 31 * GIB]
    assert [gpu.used_by({os.getpid()}) for gpu in found] == [5 * GIB, 0]
    assert driver.open == 0


def test_a_partitioned_gpu_is_read_by_its_instances(
    engine: tuple[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers 1 and 3 of seven exist: each has its own identity, size and processes."""
    _, (core, worker) = engine
    driver = Driver(
        {"uuid": "GPU-w", "total": 40 * GIB, "processes": {}, "instances": {}},
        {
            "uuid": "GPU-p",
            "total": 80 * GIB,
            "processes": {},
            "instances": {
                1: {"uuid": "MIG-1", "total": 20 * GIB, "processes": {core: 9 * GIB}},
                3: {"uuid": "MIG-3", "total": 40 * GIB, "processes": {worker: 12 * GIB}},
            },
        },
    )
    driver.install(monkeypatch)
    found = {gpu.index: (gpu.uuid, gpu.total, gpu.used_by({core})) for gpu in read_gpus()}
    assert found == {
        # Could be partitioned, and is not.
        "0": ("GPU-w", 40 * GIB, 0),
        "1:1": ("MIG-1", 20 * GIB, 9 * GIB),
        "1:3": ("MIG-3", 40 * GIB, 0),
    }


def test_a_lost_gpu_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is absent, the next one is there."""
    Driver({"lost": True}, {"uuid": "GPU-b", "total": 1, "processes": {}}).install(monkeypatch)
    assert [gpu.index for gpu in read_gpus()] == ["1"]


def test_what_the_driver_does_not_say_is_not_zero() -> None:
    """Bytes withheld, or only processes of a view that is not ours: unknown."""
    me = os.getpid()

    def gpu(**processes: int | None) -> GpuReading:
        used = {me if name == "me" else OUTSIDE: size for name, size in processes.items()}
        return GpuReading(index="0", uuid="u", total=1, used_by_process=used)

    assert gpu(me=None).used_by({me}) is None
    assert gpu(stranger=7).used_by({me}) is None
    assert gpu(me=5, stranger=7).used_by({me}) == 5
    assert gpu().used_by({me}) == 0
