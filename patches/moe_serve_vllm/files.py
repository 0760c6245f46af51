"""safetensors headers against the table, before a weight is read."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from moe_serve_vllm.errors import WeightsError
from moe_serve_vllm.families import ServedFamily, whole
from moe_serve_vllm.table import LayerTable

_INDEX: Final = "model.safetensors.index.json"
_MANIFEST: Final = "moe_serve.json"
_MAX_HEADER: Final = 100_000_000
_UNREADABLE: Final = (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError)
"""What reading a damaged JSON file as an object of known form may raise."""
_REMEDY: Final = "fetch the named files again or prune again"
_BITS: Final = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 8),
}

_SERVED: Final = ("F32", "F16", "BF16")
_MAX_NAME: Final = 255


class Stored(NamedTuple):
    """A tensor as its file's header describes it."""

    shape: tuple[int, ...]
    dtype: str
    file: str


Tensors = dict[str, Stored]


class _Object(list[tuple[str, Any]]):
    """A JSON object, all of its pairs kept, told from an array."""


def check_files(
    folder: Path, family: ServedFamily, tables: dict[int, LayerTable], config: dict[str, Any]
) -> None:
    """Every tensor is whole, stored once, and every expert tensor is one the table asks for.

    Raises:
        WeightsError: naming all defects found, up to eight.
    """
    problems: list[str] = []
    tensors: Tensors = {}
    for file in _shards(folder, problems):
        for name, stored in _header(file, problems):
            if name in tensors:
                also = f"also in {tensors[name].file}"
                problems.append(f"{file.name}: tensor {name} is stored twice, {also}")
            tensors[name] = stored
    if not problems:
        problems += _index_problems(folder, tensors)
        problems += _expert_problems(tensors, family, tables, config)
    if problems:
        raise WeightsError(str(folder), problems[:8], _REMEDY)


def check_hashes(folder: Path) -> int:
    """Compare every file with the manifest; return how many there are.

    Raises:
        WeightsError: a file is absent or differs.
    """
    try:
        files = dict(json.loads((folder / _MANIFEST).read_text())["files"])
    except _UNREADABLE as exc:
        raise WeightsError(str(folder), [f"{_MANIFEST} can't be read ({exc})"], _REMEDY) from exc
    problems = []
    for name, digest in files.items():
        path = folder / name
        if not _plain(name) or not path.is_file():
            problems.append(f"{name} is missing")
            continue
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                problems.append(f"{name} differs from its SHA-256")
    if problems:
        raise WeightsError(str(folder), problems[:8], _REMEDY)
    return len(files)


def _shards(folder: Path, problems: list[str]) -> list[Path]:
    index = folder / _INDEX
    if not index.exists():
        return sorted(f for f in folder.glob("model*.safetensors") if f.is_file())
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except _UNREADABLE as exc:
        problems.append(f"{_INDEX} can't be read ({exc})")
        return []
    missing = [name for name in names if not _plain(name) or not (folder / name).is_file()]
    problems += [f"{name} is missing" for name in missing]
    return [folder / name for name in names if name not in missing]


def _plain(name: object) -> bool:
    """Whether this is the name of a file in the same directory."""
    return isinstance(name, str) and Path(name).name == name and len(name) <= _MAX_NAME


def _header(file: Path, problems: list[str]) -> Iterator[tuple[str, Stored]]:
    """The tensors of one file; what is wrong goes into ``problems``."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if length > min(_MAX_HEADER, size - 8):
            problems.append(f"{file.name}: {size} bytes are too few for its header")
            return
        try:
            pairs = json.loads(handle.read(length), object_pairs_hook=_Object)
        except (ValueError, RecursionError):
            pairs = None
        if not isinstance(pairs, _Object):
            problems.append(f"{file.name}: its header is no JSON object")
            return
    end = 0
    found = []
    for name, spec in pairs:
        if name == "__metadata__":
            continue
        entry = dict(spec) if isinstance(spec, _Object) else {}
        shape: Any = entry.get("shape")
        offsets: Any = entry.get("data_offsets")
        bits = _BITS.get(str(entry.get("dtype")))
        sizes = type(shape) is list and all(type(n) is int and n >= 0 for n in shape)
        if (
            bits is None
            or not sizes
            or type(offsets) is not list
            or len(offsets) != 2
            or not all(type(n) is int for n in offsets)
            or offsets[1] - offsets[0] != math.prod(shape) * bits // 8
        ):
            problems.append(f"{file.name}: tensor {name} has an impossible header entry")
            continue
        end = max(end, offsets[1])
        found.append(
            (offsets[0], offsets[1], name, Stored(tuple(shape), entry["dtype"], file.name))
        )
    position = 0
    for begin, stop, name, _ in sorted(found):
        if begin != position:
            problems.append(f"{file.name}: tensor {name} overlaps another or leaves a gap")
        position = stop
    if 8 + length + end != size:
        problems.append(
            f"{file.name}: its header describes {8 + length + end} bytes, the file has {size}"
        )
    for _, _, name, stored in found:
        yield name, stored


def _index_problems(folder: Path, tensors: Tensors) -> list[str]:
    index = folder / _INDEX
    if not index.exists():
        return []
    listed = set(json.loads(index.read_text())["weight_map"])
    problems = [f"{_INDEX}: {name} is in no shard" for name in sorted(listed - tensors.keys())]
    problems += [f"{_INDEX}: does not name {name}" for name in sorted(tensors.keys() - listed)]
    return problems


def _expert_problems(
    tensors: Tensors, family: ServedFamily, tables: dict[int, LayerTable], config: dict[str, Any]
) -> list[str]:
    experts, _, width = family.sizes(config)
    hidden = whole(config, "hidden_size")
    problems = []
    for layer in family.moe_layers(config):
        table = tables.get(layer)
        count, size = (table.blocks, table.width) if table else (experts, width)
        prefix = family.experts.format(layer=layer)
        wide, tall = (size, hidden), (hidden, size)
        expected = {
            f"{prefix}{number}.{ending}": shape
            for number in range(count)
            for ending, shape in zip(family.projections, (wide, wide, tall), strict=True)
        }
        for name, shape in expected.items():
            stored = tensors.get(name)
            if stored is None:
                problems.append(f"layer {layer}: tensor {name} is missing")
            elif stored.shape != shape:
                problems.append(
                    f"layer {layer}: tensor {name} is {list(stored.shape)}, not {list(shape)}"
                )
            elif stored.dtype not in _SERVED:
                problems.append(
                    f"layer {layer}: tensor {name} is {stored.dtype}, not {', '.join(_SERVED)}"
                )
        surplus = [n for n in tensors if n.startswith(prefix) and n not in expected]
        problems += [f"layer {layer}: tensor {name} belongs to no block" for name in surplus]
    return problems
