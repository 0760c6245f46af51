"""Which checkpoint a directory holds, told from a few bytes of every tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, Final

from moe_serve.checkpoint.header import TensorEntry
from moe_serve.files import reading

SAMPLE: Final = 64
"""Bytes read from the middle of each tensor."""


def fingerprint_of(config: Mapping[str, Any], tensors: Iterable[TensorEntry]) -> str:
    """SHA-256 over the config, all headers and :data:`SAMPLE` bytes of each tensor.

    Fine-tunes of one model have the same headers, and differ in nearly every weight of the tensors
    that were trained. A damaged byte outside of the samples does not show: the files' hashes do
    that.

    Raises:
        CheckpointError: a file can't be read.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    ordered = sorted(tensors, key=lambda entry: (entry.file.name, entry.start, entry.name))
    for file, entries in groupby(ordered, key=lambda entry: entry.file):
        with reading(file), file.open("rb") as handle:
            for entry in entries:
                said = f"{entry.name} {entry.dtype} {entry.shape} {file.name} {entry.start}\n"
                digest.update(said.encode())
                handle.seek(entry.start + max(entry.size - SAMPLE, 0) // 2)
                digest.update(handle.read(min(entry.size, SAMPLE)))
    return digest.hexdigest()
