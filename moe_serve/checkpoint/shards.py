"""Writing safetensors shards of known layout: each tensor once, in place, in any order."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from moe_serve.checkpoint.dtypes import DTYPE_NAMES, itemsize
from moe_serve.checkpoint.listing import INDEX, SINGLE
from moe_serve.errors import OutputError
from moe_serve.files import write_json, writing

SHARD_BYTES: Final = 4 * 1024**3
"""Default size above which the next run of tensors begins a new shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        size = itemsize(self.dtype)
        for n in self.shape:
            size *= n
        return size


Run = tuple[TensorSpec, ...]
"""Tensors that stay together, consecutive in one shard (a block's three matrices)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    file: Path
    offset: int
    spec: TensorSpec


class ShardWriter:
    """Shards whose sizes and headers are on disk before the first weight.

    Reserving the space first makes a full disk show at once, and fixed places make a resumed
    run write the same bytes as an uninterrupted one.
    """

    def __init__(
        self,
        folder: Path,
        runs: Iterable[Run],
        *,
        file: str | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Lay the runs out over shards in ``folder``, creating files that are not there yet.

        Args:
            folder: an existing directory.
            runs: what will be written, in order.
            file: put everything into one file of this name.
            shard_bytes: otherwise the size above which a new shard begins.
        """
        self._places: dict[str, _Place] = {}
        self._files: list[Path] = []
        if file is not None:
            self._open(folder / file, [spec for run in runs for spec in run])
        else:
            groups = list(_fill(runs, shard_bytes))
            total = len(groups)
            for number, specs in enumerate(groups, 1):
                name = SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
                self._open(folder / name, specs)
        self._folder = folder

    def write_index(self) -> None:
        """Write ``model.safetensors.index.json`` with the true total size."""
        size = sum(place.spec.size for place in self._places.values())
        weight_map = {name: place.file.name for name, place in self._places.items()}
        write_json(
            self._folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map}
        )

    def _open(self, file: Path, specs: list[TensorSpec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.size],
            }
            position += spec.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data = struct.pack("<Q", len(text)) + text
        with writing(file):
            if not file.exists() or file.stat().st_size != len(data) + position:
                temporary = file.with_name(f".{file.name}.tmp")
                with temporary.open("wb") as out:
                    out.write(data)
                    out.flush()
                    os.posix_fallocate(out.fileno(), 0, len(data) + position)
                temporary.replace(file)
        self._files.append(file)
        offset = len(data)
        for spec in specs:
            if spec.name in self._places:
                raise OutputError(
                    f"tensor {spec.name!r} would be written twice",
                    where=str(file),
                    remedy="report it: the layout names a tensor twice",
                )
            self._places[spec.name] = _Place(file=file, offset=offset, spec=spec)
            offset += spec.size

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor of the layout, in stored order."""
        return tuple(self._places)

    def write_bytes(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Put a tensor's bytes in their place."""
        place = self._places[name]
        if len(data) != place.spec.size:
            raise OutputError(
                f"tensor {name!r} has {len(data)} bytes, its place has {place.spec.size}",
                where=str(place.file),
                remedy="remove the unfinished output and run again; if it comes back, report it",
            )
        self.write_part(name, 0, data)

    def write_part(self, name: str, start: int, data: bytes | bytearray | memoryview) -> None:
        """Put some of a tensor's bytes in their place, beginning at its byte ``start``."""
        place = self._places[name]
        if start + len(data) > place.spec.size:
            raise OutputError(
                f"tensor {name!r} ends before these bytes",
                where=str(place.file),
                remedy="remove the unfinished output and run again; if it comes back, report it",
            )
        with writing(place.file), place.file.open("r+b", buffering=0) as file:
            view = memoryview(data)
            position = place.offset + start
            while view:
                count = os.pwrite(file.fileno(), view, position)
                position += count
                view = view[count:]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place; type and shape must be those of the layout."""
        spec = self._places[name].spec
        if DTYPE_NAMES.get(tensor.dtype) != spec.dtype or tuple(tensor.shape) != spec.shape:
            raise OutputError(
                f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"its place is {spec.dtype} {list(spec.shape)}",
                where=str(self._places[name].file),
                remedy="report it: a plan and its layout disagree",
            )
        if spec.size:
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self.write_bytes(name, memoryview(raw.numpy().data))

    def sync(self) -> None:
        """Bring everything written so far to the disk itself."""
        for file in self._files:
            with writing(file), file.open("rb") as handle:
                os.fsync(handle.fileno())


def _fill(runs: Iterable[Run], shard_bytes: int) -> Iterator[list[TensorSpec]]:
    """Group runs into shards, in order; a run is never split."""
    shard: list[TensorSpec] = []
    size = 0
    for run in runs:
        more = sum(spec.size for spec in run)
        if shard and size + more > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.extend(run)
        size += more
    yield shard
