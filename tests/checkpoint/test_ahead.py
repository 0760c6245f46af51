"""Reading ahead gives the same bytes, once, and the same errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_serve.checkpoint import ahead
from moe_serve.checkpoint.ahead import read_entry
from moe_serve.checkpoint.header import TensorEntry
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import IncompleteCheckpoint
from tests.support.models import make_model


def test_reading_ahead_reads_each_tensor_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, from the thread, counted once; a file cut off meanwhile is named."""
    path = make_model(tmp_path / "m", "mixtral")
    plain, checkpoint = open_checkpoint(path), open_checkpoint(path)
    read: list[str] = []

    def counting(entry: TensorEntry) -> bytearray:
        read.append(entry.name)
        return read_entry(entry)

    monkeypatch.setattr(ahead, "read_entry", counting)
    checkpoint.read_ahead(1)
    entries = checkpoint.layer_tensors(1)
    for entry in entries:
        assert checkpoint.read_bytes(entry.name) == plain.read_bytes(entry.name)
    assert sorted(read) == sorted(entry.name for entry in entries)
    assert checkpoint.bytes_read == plain.bytes_read == sum(entry.size for entry in entries)
    checkpoint.read_ahead(7)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: entries[0].start + 10])
    checkpoint.read_ahead(1)
    with pytest.raises(IncompleteCheckpoint, match="ends inside tensor"):
        checkpoint.read_bytes(entries[0].name)
