"""Well-known GPUs by name: ``--gpu "RTX 4090"`` instead of ``--memory``."""

from __future__ import annotations

import re
from typing import Final

from moe_serve.errors import UsageError
from moe_serve.pruning.forecasts.sizing import parse_size

MEMORY_MIB: Final = {
    "T4": 15_360,
    "V100 16GB": 16_384,
    "V100 32GB": 32_768,
    "RTX 3060": 12_288,
    "RTX 3090": 24_576,
    "RTX 4060 Ti 16GB": 16_380,
    "RTX 4080": 16_376,
    "RTX 4090": 24_564,
    "RTX 5080": 16_303,
    "RTX 5090": 32_607,
    "RTX A5000": 24_564,
    "RTX A6000": 49_140,
    "RTX 6000 Ada": 49_140,
    "RTX PRO 6000": 97_887,
    "A10": 23_028,
    "A10G": 23_028,
    "A40": 46_068,
    "L4": 23_034,
    "L40S": 46_068,
    "A100 40GB": 40_960,
    "A100 80GB": 81_920,
    "H100": 81_559,
    "H200": 143_771,
    "B200": 183_359,
}
"""MiB as the driver reports them, which is less than the name says where ECC takes its part."""
_NOISE: Final = re.compile(r"nvidia|geforce|tesla|[^a-z0-9]")


def gpu_memory(name: str) -> int:
    """Bytes of a GPU; its name in any case, with or without the maker's.

    Raises:
        UsageError: it is not in the table, or stands for several sizes.
    """
    wanted = _plain(name)
    sizes = {_plain(known): size for known, size in MEMORY_MIB.items()}
    if wanted in sizes:
        return sizes[wanted] * 2**20
    alike = [known for known in MEMORY_MIB if wanted and _plain(known).startswith(wanted)]
    known = ", ".join(alike or MEMORY_MIB)
    raise UsageError(
        f"{name!r} comes in several sizes" if alike else f"no GPU {name!r} is known",
        where="--gpu",
        remedy=f"give one of {known}; or --memory with its size",
    )


def wanted_memory(memory: str | None, gpu: str | None) -> int | None:
    """Bytes of one GPU, from a size or a name.

    Raises:
        UsageError: both were given, or neither can be read.
    """
    if memory is not None and gpu is not None:
        raise UsageError(
            "say the same twice", where="--memory, --gpu", remedy="give one of the two"
        )
    if gpu is not None:
        return gpu_memory(gpu)
    return parse_size(memory) if memory is not None else None


def _plain(name: str) -> str:
    return _NOISE.sub("", name.casefold())
