"""What tells a checkpoint from another that lies in the same place."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.fixtures import MODEL
from moe_serve.serving.identity import identity


def test_a_copy_is_the_same_and_another_one_is_not(tmp_path: Path) -> None:
    """One byte at the end of the weights, or a word of the configuration; no directory: unknown."""
    copy = tmp_path / "model"
    shutil.copytree(MODEL, copy)
    found = identity(MODEL)
    assert identity(copy) == found
    weights = next(copy.glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert identity(copy) != found
    shutil.copy(next(MODEL.glob(weights.name)), weights)
    assert identity(copy) == found
    config = copy / "config.json"
    config.write_text(config.read_text() + " ")
    assert identity(copy) != found
    assert identity(tmp_path / "gone") == ""
