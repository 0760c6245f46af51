"""Which tensors a directory of safetensors files holds, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from moe_serve.checkpoint.header import TensorEntry, read_header
from moe_serve.errors import CheckpointError, IncompleteCheckpoint
from moe_serve.files import read_json

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"


def list_tensors(path: Path) -> dict[str, TensorEntry]:
    """All tensors by name, as headers and index agree; no weight is read.

    Raises:
        IncompleteCheckpoint: a file is missing that should be there.
        CheckpointError: headers or index contradict one another.
    """
    index = path / INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError("has no weight_map", where=str(index), remedy="fetch it again")
        files = sorted({path / str(name) for name in weight_map.values()})
    else:
        weight_map = None
        single = path / SINGLE
        files = [single] if single.exists() else sorted(path.glob("model-*.safetensors"))
    if not files:
        others = ", ".join(sorted(p.name for p in path.glob("*.bin"))[:3])
        raise IncompleteCheckpoint(
            "holds no safetensors file" + (f" (but {others})" if others else ""),
            where=str(path),
            remedy="convert the checkpoint to safetensors; pickled weights are never loaded",
        )
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for entry in read_header(file):
            if entry.name in tensors:
                raise CheckpointError(
                    f"tensor {entry.name!r} is stored twice, "
                    f"also in {tensors[entry.name].file.name}",
                    where=str(file),
                    remedy="remove the stale shard",
                )
            tensors[entry.name] = entry
    if weight_map is not None:
        _check_index(index, weight_map, tensors)
    return tensors


def _check_index(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorEntry]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise IncompleteCheckpoint(
                f"the index places tensor {name!r} in {file}, which does not hold it",
                where=str(index),
                remedy="fetch index and shards from the same revision",
            )
    if extra := sorted(set(tensors) - set(weight_map)):
        raise CheckpointError(
            f"the shards hold {len(extra)} tensors that the index does not name, "
            f"first {extra[0]!r}",
            where=str(index),
            remedy="fetch index and shards from the same revision",
        )
