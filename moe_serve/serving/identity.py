"""Which checkpoint an engine loads, told without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from moe_serve.files import reading

_END: Final = 65_536
"""Bytes read at each end of a weight file: its header, and weights of its last tensors."""


def identity(model: Path) -> str:
    """SHA-256 over its description and its weight files' names, sizes and ends.

    Empty where the directory is not here (an engine elsewhere).

    Raises:
        CheckpointError: a file is there and can't be read.
    """
    if not model.is_dir():
        return ""
    found = hashlib.sha256()
    with reading(model):
        for file in sorted([*model.glob("*.json"), *model.glob("*.safetensors")]):
            size = file.stat().st_size
            found.update(f"{file.name}\n{size}\n".encode())
            with file.open("rb") as opened:
                found.update(opened.read(_END))
                if size > _END:
                    opened.seek(max(_END, size - _END))
                    found.update(opened.read(_END))
    return found.hexdigest()
