"""Damaged checkpoints are named: which file, which tensor, what to do."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import CheckpointError, IncompleteCheckpoint, MoeServeError
from tests.support.models import make_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound model."""
    return make_model(tmp_path / "m", "qwen3_moe")


def rewrite(model: Path, **changes: object) -> None:
    """Change config values; ``None`` removes a key."""
    config = json.loads((model / "config.json").read_text())
    config |= changes
    kept = {k: v for k, v in config.items() if v is not None}
    (model / "config.json").write_text(json.dumps(kept))


def test_tensors_read_as_stored(model: Path) -> None:
    """Every tensor equals what safetensors' own reader gives; the bytes read are counted."""
    checkpoint = open_checkpoint(model)
    for name, expected in load_file(model / "model.safetensors").items():
        assert torch.equal(checkpoint.read(name), expected)
    total = sum(entry.size for entry in checkpoint.tensors.values())
    assert checkpoint.bytes_read == total


def test_a_truncated_shard_is_named(model: Path) -> None:
    """The last kilobyte is missing."""
    file = model / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1024)
    with pytest.raises(IncompleteCheckpoint, match=r"model\.safetensors.*fetch this file again"):
        open_checkpoint(model)


def test_a_missing_expert_is_named(model: Path) -> None:
    """One tensor is gone."""
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.experts.4.down_proj.weight"
    del weights[name]
    save_file(weights, model / "model.safetensors")
    with pytest.raises(IncompleteCheckpoint, match=name):
        open_checkpoint(model)


def test_a_config_that_contradicts_the_weights(model: Path) -> None:
    """Another width, another count, another vocabulary of layers."""
    rewrite(model, moe_intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"expected \[96, 64\]"):
        open_checkpoint(model)
    rewrite(model, moe_intermediate_size=64, num_experts=4, num_local_experts=None)
    with pytest.raises(CheckpointError, match="4 experts of hidden size 64"):
        open_checkpoint(model)


def test_pickled_weights_are_never_loaded(model: Path) -> None:
    """A .bin checkpoint is refused with the way out."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(IncompleteCheckpoint, match="convert the checkpoint to safetensors"):
        open_checkpoint(model)


def test_a_stale_shard_is_named(model: Path) -> None:
    """A tensor stored twice."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    save_file(
        {"model.norm.weight": weights["model.norm.weight"]},
        model / "model-00002-of-00002.safetensors",
    )
    with pytest.raises(CheckpointError, match="stored twice"):
        open_checkpoint(model)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 4000), value=st.integers(0, 255))
def test_a_damaged_header_never_crashes(model: Path, position: int, value: int) -> None:
    """Any byte of header or length changed: our error, or a checkpoint that opens."""
    file = model / "model.safetensors"
    data = bytearray(file.read_bytes())
    old = data[position]
    data[position] = value
    file.write_bytes(data)
    with suppress(MoeServeError):
        open_checkpoint(model)
    data[position] = old
    file.write_bytes(data)
