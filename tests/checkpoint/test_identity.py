"""A fingerprint tells checkpoints apart that have the same headers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import CheckpointError
from tests.support.models import make_model


def test_a_fine_tune_is_another_model(tmp_path: Path) -> None:
    """The same config and headers; one tensor of attention was trained."""
    base = make_model(tmp_path / "base", "qwen3_moe")
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    weights = load_file(tuned / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"] *= 1.001
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(base).fingerprint() != open_checkpoint(tuned).fingerprint()


def test_a_copy_is_the_same_model(tmp_path: Path) -> None:
    """Wherever it lies, and no weight counts as read."""
    base = make_model(tmp_path / "base", "qwen3_moe")
    copied = Path(shutil.copytree(base, tmp_path / "elsewhere"))
    checkpoint = open_checkpoint(copied)
    assert open_checkpoint(base).fingerprint() == checkpoint.fingerprint()
    assert checkpoint.bytes_read == 0


def test_a_file_that_went_is_named(tmp_path: Path) -> None:
    """Between opening and reading."""
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "qwen3_moe"))
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file does not exist"):
        checkpoint.fingerprint()
