"""Several processes that calibrate together, each on its share of the sequences."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import distributed

_CHUNK: Final = 2**28
"""Bytes summed at once: what it takes on the device beside the layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """This process among ``size`` equal ones; alone, every method is free of cost."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where sums are exchanged."""

    @torch.inference_mode()
    def sum(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the group, in place, in an order fixed by ranks."""
        if self.size == 1:
            return
        for tensor in tensors:
            flat = tensor.view(-1)
            for part in flat.split(max(1, _CHUNK // tensor.element_size())):
                moved = part.to(self.device)
                distributed.all_reduce(moved)
                part.copy_(moved)

    def all(self, mine: bool) -> bool:
        """Whether every process says so."""
        return self._count(mine) == self.size

    def any(self, mine: bool) -> bool:
        """Whether some process says so."""
        return self._count(mine) > 0

    def _count(self, mine: bool) -> int:
        count = torch.tensor([int(mine)])
        self.sum([count])
        return int(count)


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group that ``torchrun`` started, or this process alone.

    NCCL between GPUs, Gloo between processors.
    """
    if not (size := started()):
        yield Group(device=device)
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(rank=distributed.get_rank(), size=size, device=device)
    finally:
        distributed.destroy_process_group()


def started() -> int:
    """Processes ``torchrun`` started, 0 where this one runs alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return size if size > 1 and "RANK" in os.environ else 0


def leads() -> bool:
    """Whether this process speaks for its group; alone, it does."""
    return not started() or os.environ["RANK"] == "0"


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process among those of its machine."""
    if device.type == "cuda" and device.index is None and started():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device
