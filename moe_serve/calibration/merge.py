"""Adding up the statistics of shards that were calibrated apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from moe_serve.calibration.share import Share
from moe_serve.calibration.store import RECORD, TENSORS, Statistics
from moe_serve.checkpoint.chain import chained
from moe_serve.checkpoint.dtypes import TORCH_DTYPES
from moe_serve.checkpoint.finite import all_finite
from moe_serve.checkpoint.hashing import file_sha256
from moe_serve.checkpoint.header import TensorEntry, read_header
from moe_serve.checkpoint.shards import ShardWriter, TensorSpec
from moe_serve.checkpoint.staging import require_space, staged
from moe_serve.errors import CalibrationError
from moe_serve.files import reading, write_json
from moe_serve.progress import Progress

_CHUNK: Final = 2**26
"""Bytes of each shard in memory at once."""
_OWN: Final = ("shard", "sha256", "model")
"""What records of one calibration's shards may differ in; the model's path is its machine's."""


def merge_statistics(parts: Sequence[Path], output: Path, progress: Progress) -> Statistics:
    """Sum all shards of one calibration into the statistics that one machine would have made.

    Sums are taken in FP64 in the order of the shards' numbers, whatever the order of ``parts``,
    and rounded once. Peak memory: a chunk of one shard and of the sum.

    Args:
        parts: folders that ``calibrate --shard`` made.
        output: folder to make.
        progress: told about every tensor.

    Raises:
        CalibrationError: one is unfinished, damaged, of another calibration, given twice, or
            missing.
        OutputError: the output can't be written.
    """
    shards = _in_order([Statistics(part) for part in parts])
    records = [shard.record for shard in shards]
    with staged(output, {"shards": [record["sha256"] for record in records]}) as staging:
        files = [read_header(shard.folder / TENSORS) for shard in shards]
        specs = [TensorSpec(name=e.name, dtype=e.dtype, shape=e.shape) for e in files[0]]
        require_space(staging.path, sum(spec.size for spec in specs))
        writer = ShardWriter(staging.path, [tuple(specs)], file=TENSORS)
        progress.start("merge", len(specs))
        digests = [_hash_of_header(shard, file) for shard, file in zip(shards, files, strict=True)]
        for entries in zip(*files, strict=True):
            _add(entries, writer, digests)
            progress.advance()
        for shard, digest in zip(shards, digests, strict=True):
            if digest.hexdigest() != shard.sha256:
                raise CalibrationError(
                    f"{TENSORS} is not what {RECORD} says",
                    where=str(shard.folder),
                    remedy="copy the folder again, or calibrate this shard again",
                )
        writer.sync()
        whole = {key: value for key, value in records[0].items() if key != "shard"}
        summed = whole | {"sha256": file_sha256(staging.path / TENSORS)}
        write_json(staging.path / RECORD, chained(summed))
    return Statistics(output)


def _in_order(shards: list[Statistics]) -> list[Statistics]:
    """All shards of one calibration, by number.

    Raises:
        CalibrationError: they are not that.
    """
    numbered: dict[int, Statistics] = {}
    for shard in shards:
        if "shard" not in shard.record:
            raise CalibrationError(
                "is a whole calibration, not a shard",
                where=str(shard.folder),
                remedy="use it as it is, or make shards with moe-serve calibrate --shard",
            )
        _check_same(shards[0], shard)
        share = Share.parse(shard.record["shard"])
        if (twin := numbered.get(share.index)) is not None:
            raise CalibrationError(
                f"is shard {share}, and so is {twin.folder}",
                where=str(shard.folder),
                remedy="give every shard once",
            )
        numbered[share.index] = shard
    of = Share.parse(shards[0].record["shard"]).of if shards else 1
    if missing := [str(Share(i, of)) for i in range(of) if i not in numbered]:
        raise CalibrationError(
            f"shards {', '.join(missing)} are missing",
            where=", ".join(str(shard.folder) for shard in shards),
            remedy="give the folders of all shards",
        )
    return [numbered[i] for i in range(of)]


def _check_same(first: Statistics, other: Statistics) -> None:
    a, b = _common(first.record), _common(other.record)
    if differing := sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)):
        raise CalibrationError(
            f"is of another calibration than {first.folder} (differs in {', '.join(differing)})",
            where=str(other.folder),
            remedy="calibrate all shards with the same model, texts, bounds and seed",
        )


def _common(record: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in record.items() if key not in _OWN}
    return own | {"shards": Share.parse(record["shard"]).of}


def _hash_of_header(shard: Statistics, entries: list[TensorEntry]) -> Any:
    path = shard.folder / TENSORS
    with reading(path), path.open("rb") as file:
        return hashlib.sha256(file.read(entries[0].start))


def _add(entries: tuple[TensorEntry, ...], writer: ShardWriter, digests: list[Any]) -> None:
    """Sum one tensor chunk by chunk, hashing each shard's bytes on the way."""
    name, dtype, size = entries[0].name, TORCH_DTYPES[entries[0].dtype], entries[0].size
    for at in range(0, size, _CHUNK):
        count = min(_CHUNK, size - at)
        total = torch.zeros(0)
        for number, (entry, digest) in enumerate(zip(entries, digests, strict=True)):
            data = _read(entry, at, count)
            digest.update(data)
            part = torch.frombuffer(data, dtype=dtype)
            exact = part.double() if part.is_floating_point() else part.clone()
            total = exact if number == 0 else total.add_(exact)
        if total.is_floating_point() and not all_finite(total):
            raise CalibrationError(
                f"{name} holds NaN or infinite values",
                where=str(entries[0].file),
                remedy="calibrate the shards again; if it stays, the model's activations overflow",
            )
        writer.write_part(name, at, memoryview(total.to(dtype).numpy().view("u1").data))


def _read(entry: TensorEntry, at: int, count: int) -> bytearray:
    data = bytearray(count)
    with reading(entry.file), entry.file.open("rb") as file:
        file.seek(entry.start + at)
        file.readinto(data)
    return data
