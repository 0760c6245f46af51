"""Index and shards that disagree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_serve.checkpoint.listing import INDEX, list_tensors
from moe_serve.errors import CheckpointError, IncompleteCheckpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, a tensor each."""
    for name in ("a", "b"):
        save_file({name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    return tmp_path


def indexed(folder: Path, weight_map: object) -> Path:
    """With an index that says so."""
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_only_what_the_index_names_is_read(folder: Path) -> None:
    """A file that it does not name is none of the checkpoint's."""
    found = list_tensors(indexed(folder, {"a": "a.safetensors"}))
    assert {name: entry.file.name for name, entry in found.items()} == {"a": "a.safetensors"}


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "b.safetensors"}, "places tensor 'a' in b.safetensors, which does not hold it"),
        ({"a": "a.safetensors", "c": "b.safetensors"}, "places tensor 'c' in b.safetensors"),
        ({}, "has no weight_map"),
        (["a"], "has no weight_map"),
        ({"a": "c.safetensors"}, "c.safetensors: the file does not exist"),
    ],
)
def test_an_index_that_lies_is_refused(folder: Path, weight_map: object, words: str) -> None:
    """Naming the tensor and the file."""
    with pytest.raises(CheckpointError, match=words):
        list_tensors(indexed(folder, weight_map))


def test_a_tensor_that_the_index_forgot_is_named(folder: Path) -> None:
    """Two in a shard, one in the index."""
    save_file({"a": torch.zeros(2), "z": torch.zeros(2)}, folder / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"hold 1 tensors that the index .* first 'z'"):
        list_tensors(indexed(folder, {"a": "a.safetensors"}))


def test_no_shard_at_all(tmp_path: Path) -> None:
    """And what is there instead."""
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(IncompleteCheckpoint, match=r"no safetensors file \(but pytorch_model.bin"):
        list_tensors(tmp_path)
