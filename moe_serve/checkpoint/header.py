"""safetensors headers, read strictly: a damaged file is named before a weight is used."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_serve.checkpoint.dtypes import TORCH_DTYPES, UNREAD, itemsize
from moe_serve.errors import CheckpointError, IncompleteCheckpoint
from moe_serve.files import REFETCH as _REFETCH
from moe_serve.files import reading

_LENGTH: Final = struct.Struct("<Q")
_MAX_HEADER: Final = 100_000_000
"""The format's own limit; a longer one is a damaged length field."""
_OTHER_FORMAT: Final = (
    "start from the BF16 checkpoint, or from one in FP16, FP32, FP8, compressed-tensors or GPTQ "
    "at 4 or 8 bits, or AWQ"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Absolute byte offset in the file."""
    size: int
    """Bytes."""


def read_header(path: Path) -> list[TensorEntry]:
    """List the tensors of one safetensors file in the order of their bytes.

    Raises:
        IncompleteCheckpoint: the file is shorter than its header says.
        CheckpointError: the header is malformed: lengths, types, shapes, overlaps or gaps.
    """
    with reading(path):
        total = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_LENGTH.size)
            if len(prefix) < _LENGTH.size:
                raise IncompleteCheckpoint(
                    f"holds {total} bytes, too few for a header", where=str(path), remedy=_REFETCH
                )
            (length,) = _LENGTH.unpack(prefix)
            if length > min(_MAX_HEADER, total - _LENGTH.size):
                raise IncompleteCheckpoint(
                    f"its header would be {length} bytes, the file is {total}",
                    where=str(path),
                    remedy=_REFETCH,
                )
            header = json.loads(file.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise CheckpointError("its header is not a JSON object", where=str(path), remedy=_REFETCH)
    data = _LENGTH.size + length
    entries = [
        _entry(path, name, spec, data) for name, spec in header.items() if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.start, entry.size))
    _check_coverage(path, entries, data, total)
    return entries


def _entry(path: Path, name: str, spec: Any, data: int) -> TensorEntry:
    match spec:
        case {
            "dtype": str(dtype),
            "shape": list(shape),
            "data_offsets": [int(begin), int(end)],
        } if dtype in TORCH_DTYPES and all(isinstance(n, int) and n >= 0 for n in shape):
            size = math.prod(shape) * itemsize(dtype)
            if end - begin == size and begin >= 0:
                return TensorEntry(
                    name=name,
                    file=path,
                    dtype=dtype,
                    shape=tuple(shape),
                    start=data + begin,
                    size=size,
                )
        case {"dtype": str(dtype)} if dtype in UNREAD:
            raise CheckpointError(
                f"tensor {name!r}: element type {dtype} is not read here",
                where=str(path),
                remedy=_OTHER_FORMAT,
            )
    raise CheckpointError(
        f"tensor {name!r} has an impossible header entry", where=str(path), remedy=_REFETCH
    )


def _check_coverage(path: Path, entries: list[TensorEntry], data: int, total: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    position = data
    for entry in entries:
        if entry.start != position:
            raise CheckpointError(
                f"tensor {entry.name!r} overlaps its neighbour or leaves a gap",
                where=str(path),
                remedy=_REFETCH,
            )
        position += entry.size
    if position != total:
        raise IncompleteCheckpoint(
            f"its header describes {position} bytes, the file has {total}",
            where=str(path),
            remedy=_REFETCH,
        )
