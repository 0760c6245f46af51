"""What two models hold in memory, and how long loading takes: as far as each can tell.

A directory: a process of its own reads all weights, as they are stored. An engine: what its
``/metrics`` say; how long ago and how fast it loaded they do not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from moe_serve.errors import CheckpointError
from moe_serve.evaluation.models import is_url
from moe_serve.metrics.sources import Source, total

_REPEATS: Final = 3
_ENGINE: Final = {
    "engine_weight_bytes": ("moe_serve_engine_memory_bytes", {"kind": "weights"}),
    "engine_kv_cache_bytes": ("moe_serve_engine_memory_bytes", {"kind": "kv_cache"}),
    "kv_cache_capacity_tokens": ("moe_serve_kv_cache_capacity_tokens", {}),
}
DEFINITIONS: Final = {
    "load_seconds": "a process of its own reads all weights as they are stored; the median of "
    f"{_REPEATS}, the two directories in turn, after one of each that is not counted (so that "
    "the files lie in the system's cache)",
    "load_resident_bytes": "by how much reading them made that process grow",
    "engine_weight_bytes": "weights, as the engine's workers hold them (its /metrics)",
    "engine_kv_cache_bytes": "the engine's cache for keys and values (its /metrics)",
    "kv_cache_capacity_tokens": "tokens whose keys and values fit that cache (its /metrics)",
}


def held(original: str, pruned: str) -> dict[str, Any]:
    """Name → definition and both values, ``None`` where one can't be told.

    Raises:
        CheckpointError: a directory's weights can't be read.
    """
    sides = {"original": original, "pruned": pruned}
    found: dict[str, dict[str, float | None]] = {name: {} for name in DEFINITIONS}
    for side, loads in _loads({s: n for s, n in sides.items() if not is_url(n)}).items():
        for name, value in loads.items():
            found[name][side] = value
    for side, url in sides.items():
        if is_url(url):
            for name, value in _engine(url).items():
                found[name][side] = value
    return {
        name: {"definition": DEFINITIONS[name], **{side: row.get(side) for side in sides}}
        for name, row in found.items()
        if any(value is not None for value in row.values())
    }


def _engine(url: str) -> dict[str, float | None]:
    root = url.rstrip("/").removesuffix("/v1")
    samples = Source(name=root, url=f"{root}/metrics").read() or []
    return {name: total(samples, metric, **labels) for name, (metric, labels) in _ENGINE.items()}


def _loads(directories: dict[str, str]) -> dict[str, dict[str, float | None]]:
    """Each in turn; nothing where a model is larger than the memory there is."""
    room = psutil.virtual_memory().available
    sizes = [sum(f.stat().st_size for f in _shards(Path(n))) for n in directories.values()]
    if not sizes or max(sizes) > room:
        return {}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in directories}
    for _ in range(1 + _REPEATS):
        for side, name in directories.items():
            runs[side].append(_load(Path(name)))
    return {
        side: {
            key: float(np.median([run[key] for run in counted]))
            for key in ("load_seconds", "load_resident_bytes")
        }
        for side, (_, *counted) in runs.items()
    }


def _load(path: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "moe_serve.evaluation.reading", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CheckpointError(
            "its weights can't be read",
            where=str(path),
            remedy=f"moe-serve verify {path} says which",
        )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))
