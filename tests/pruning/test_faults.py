"""Faults of a whole run: each a clear error with the way out, and nothing lost or half-written."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_serve.checkpoint.manifest import Manifest
from moe_serve.checkpoint.staging import staged
from moe_serve.errors import CalibrationError, IncompleteCheckpoint, OutputError
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.models import make_model, write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration texts."""
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers in FP32."""
    return make_model(tmp_path / "m", "qwen3_moe")


def request(model: Path, texts: Path, output: Path) -> PruneRequest:
    """Half, re-fitted."""
    options = TextOptions(paths=(texts,), tokens=1000, length=128)
    return PruneRequest(
        model=model,
        output=output,
        texts=options,
        selection=Selection(keep=0.5, method="block-obs"),
    )


def test_a_disk_that_fills_up_loses_nothing(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space after 3, 25, 25 writes more; with space again the same command ends the same."""
    whole = prune(request(model, texts, tmp_path / "whole"), Silent()).manifest
    again = request(model, texts, tmp_path / "out")
    real: Callable[..., int] = os.pwrite
    for allowed in (3, 25, 25):
        left = [allowed]

        def scarce(*arguments: object, left: list[int] = left) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        monkeypatch.setattr(os, "pwrite", scarce)
        with pytest.raises(OutputError, match="disk is full; free some space and run the same"):
            prune(again, Silent())
        assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert prune(again, Silent()).manifest.files == whole.files
    assert not (tmp_path / "out.partial").exists()


def test_a_real_limit_of_the_system_is_named(model: Path, texts: Path, tmp_path: Path) -> None:
    """Hidden states of 2,000 tokens × 64 × 4 bytes do not fit 300 kB; without the limit they do."""
    command = [
        *(sys.executable, "-m", "moe_serve", "prune", str(model), str(tmp_path / "out")),
        *("--keep", "0.5", "--method", "block-obs", "--calibration", str(texts)),
        *("--tokens", "1000", "--sequence-length", "128"),
    ]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    stopped = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited,
    )
    assert stopped.returncode == 2
    assert "ulimit -f" in stopped.stderr
    assert not (tmp_path / "out").exists()
    subprocess.run(command, capture_output=True, check=True)
    assert Manifest.load(tmp_path / "out").files


def test_two_runs_into_one_output(model: Path, texts: Path, tmp_path: Path) -> None:
    """The second is refused at once and leaves the first's files alone."""
    with staged(tmp_path / "out", {}) as first:
        (first.path / "mine").write_text("kept")
        with pytest.raises(OutputError, match="another process is writing"):
            prune(request(model, texts, tmp_path / "out"), Silent())
    assert (tmp_path / "out/mine").read_text() == "kept"
    with pytest.raises(OutputError, match="exists already"):
        prune(request(model, texts, tmp_path / "out"), Silent())
    assert not (tmp_path / "out.partial").exists()


def test_a_shard_that_is_half_there(model: Path, texts: Path, tmp_path: Path) -> None:
    """The file is named before anything is written."""
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(IncompleteCheckpoint, match=r"model\.safetensors: .*fetch this file again"):
        prune(request(model, texts, tmp_path / "out"), Silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_activations_that_overflow(model: Path, texts: Path, tmp_path: Path) -> None:
    """Finite weights, infinite hidden states: the layer that saw them first is named."""
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.self_attn.o_proj.weight"] *= 1e38
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=r"layer 0: .*NaN or infinite.*SHA-256"):
        prune(request(model, texts, tmp_path / "out"), Silent())
    assert not (tmp_path / "out").exists()
