"""Whole offline runs on tiny models: identity, budgets, determinism, faults, resumption."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.manifest import Manifest
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.checkpoint.staging import WORK
from moe_serve.errors import CheckpointError, MoeServeError, OutputError, PlanError, UsageError
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.methods.registry import METHODS as REGISTERED
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.models import make_model, write_texts

METHODS = ("block-obs", "block-magnitude", "drop-reap", "merge-cka")


def request(model: Path, output: Path, texts: Path | None, **selection: object) -> PruneRequest:
    """A run with small sequences."""
    form = str(selection.pop("form", "compact"))
    batch = int(str(selection.pop("batch_tokens", 512)))
    wanted = {"keep": 0.5} if "experts" not in selection else {}
    return PruneRequest(
        model=model,
        output=output,
        texts=TextOptions(paths=(texts,) if texts else (), tokens=2048, length=128),
        selection=Selection(**(wanted | selection)),  # type: ignore[arg-type]
        form=form,
        batch_tokens=batch,
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration texts."""
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 model with dense layers, shared experts and a router with bias and groups."""
    return make_model(tmp_path_factory.mktemp("model") / "m", "deepseek_v3", dtype=torch.bfloat16)


def test_states_kept_or_made_again_give_the_same_bytes(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without room for hidden states or activations the re-fit makes them again, bit for bit."""
    kept = prune(request(model, tmp_path / "kept", texts, method="block-obs"), Silent())
    monkeypatch.setattr("moe_serve.pruning.gathering.KEPT_BYTES", 0)
    monkeypatch.setattr("moe_serve.pruning.fitting.routed.KEPT_BYTES", 0)
    again = prune(request(model, tmp_path / "again", texts, method="block-obs"), Silent())
    assert kept.manifest.files == again.manifest.files


@pytest.mark.parametrize("method", METHODS)
def test_bytes_stay_within_the_budget(
    method: str, model: Path, texts: Path, tmp_path: Path
) -> None:
    """At most keep times the original's bytes, and within one block of it per layer at most."""
    chosen = None if method == "block-magnitude" else texts
    result = prune(request(model, tmp_path / "out", chosen, method=method, keep=0.6), Silent())
    assert verify(tmp_path / "out", model, Silent()).problems == []
    before, after = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    sizes, kept = before.expert_bytes(), after.expert_bytes()
    blocks = sum(kept[i] / table.blocks for i, table in after.table.layers.items())
    assert 0.6 * sum(sizes.values()) - blocks <= sum(kept.values()) <= 0.6 * sum(sizes.values())
    assert result.manifest.expert_bytes.kept == sum(after.expert_bytes().values())


@pytest.mark.parametrize("method", METHODS)
def test_runs_are_deterministic(method: str, model: Path, texts: Path, tmp_path: Path) -> None:
    """The same seed gives the same hash of every file."""
    chosen = None if method == "block-magnitude" else texts
    hashes = [
        prune(request(model, tmp_path / n, chosen, method=method), Silent()).manifest.files
        for n in "ab"
    ]
    assert hashes[0] == hashes[1]
    assert (tmp_path / "a/moe_serve.json").read_bytes() == (
        tmp_path / "b/moe_serve.json"
    ).read_bytes()


def test_methods_without_gradients_spare_the_reverse_pass(texts: Path, tmp_path: Path) -> None:
    """The same plan as from full statistics, and each such method can do without them."""
    model = make_model(tmp_path / "m", "qwen3_moe")
    short = request(model, tmp_path / "a", texts, method="drop-reap")
    prune(short, Silent())
    prune(replace(short, output=tmp_path / "b", statistics=tmp_path / "s"), Silent())
    assert Statistics(tmp_path / "s").has_gradients
    plans = [Plan.load(tmp_path / name / "plan.json") for name in "ab"]
    assert plans[0].layers == plans[1].layers
    record = json.loads((tmp_path / "s/statistics.json").read_text()) | {"gradients": 0}
    (tmp_path / "s/statistics.json").write_text(json.dumps(record))
    without = [method.name for method in REGISTERED.values() if method.loss == "nothing"]
    assert len(without) > 5
    for name in without:
        selection = Selection(keep=0.5, method=name)
        made = make_plan(open_checkpoint(model), Statistics(tmp_path / "s"), selection, Silent())
        assert made.layers


def test_batch_size_changes_only_rounding(texts: Path, tmp_path: Path) -> None:
    """The plan is the same; re-fitted weights agree to 1e-3 of their norm."""
    model = make_model(tmp_path / "m", "qwen3_moe")
    for size in (128, 700):
        prune(request(model, tmp_path / str(size), texts, batch_tokens=size), Silent())
    plans = [Plan.load(tmp_path / str(s) / "plan.json") for s in (128, 700)]
    tables = [{i: [b.parts for b in p.layers[i].blocks] for i in p.layers} for p in plans]
    assert tables[0] == tables[1]
    weights = [load_file(tmp_path / str(s) / "model.safetensors") for s in (128, 700)]
    for name, weight in weights[0].items():
        assert float((weight - weights[1][name]).norm()) <= 1e-3 * float(weight.norm())


def test_a_killed_run_resumes_to_the_same_hashes(texts: Path, tmp_path: Path) -> None:
    """Kill -9 at random moments, then the same command: as if nothing had happened."""
    model = make_model(tmp_path / "m", "qwen3_moe", experts=16, width=128, num_hidden_layers=4)
    whole = prune(request(model, tmp_path / "whole", texts), Silent()).manifest
    command = [
        *(sys.executable, "-m", "moe_serve", "prune", str(model), str(tmp_path / "out")),
        *("--keep", "0.5", "--calibration", str(texts), "--tokens", "2048"),
        *("--sequence-length", "128", "--batch-tokens", "512"),
    ]
    journal = tmp_path / "out.partial" / WORK / "journal.json"
    rng = random.Random(0)
    kills = 0
    for _ in range(6):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        # Waiting for a step rather than for a time: the machine's speed decides nothing.
        wanted = steps_done(journal) + rng.randint(1, 3)
        while process.poll() is None and steps_done(journal) < wanted:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.02))
        process.kill()
        if process.wait() != -signal.SIGKILL:
            break  # It had finished.
        kills += 1
    subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    assert kills >= 2
    assert Manifest.load(tmp_path / "out").files == whole.files
    assert not (tmp_path / "out.partial").exists()


def steps_done(journal: Path) -> int:
    """Finished steps on record; 0 before there is a journal or after the run's end."""
    try:
        return len(json.loads(journal.read_text())["done"])
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(
    ("selection", "error", "words"),
    [
        (
            {"method": "nonsense"},
            UsageError,
            "choose from auto, block-heapr, block-magnitude, block-obs",
        ),
        ({"keep": 0.0}, UsageError, "not in"),
        ({"experts": 1, "method": "drop-reap"}, PlanError, "the router selects 2"),
        ({"experts": 9}, PlanError, "the model has 8 experts"),
        ({"block_width": 33}, UsageError, "not a multiple of 32"),
        (
            {"method": "merge-cka", "drop_when_better": False, "form": "native"},
            PlanError,
            "share blocks|combinations",
        ),
    ],
)
def test_impossible_requests_are_refused(
    selection: dict[str, object],
    error: type[MoeServeError],
    words: str,
    texts: Path,
    tmp_path: Path,
) -> None:
    """Before anything is written, with the way out."""
    model = make_model(tmp_path / "m", "mixtral")
    with pytest.raises(error, match=words):
        prune(request(model, tmp_path / "out", texts, **selection), Silent())
    assert not (tmp_path / "out").exists()


def test_methods_that_need_texts_say_so(tmp_path: Path) -> None:
    """Without texts the weights alone decide, or the message names what can."""
    model = make_model(tmp_path / "m", "mixtral")
    with pytest.raises(UsageError, match="from the weights alone: block-magnitude"):
        prune(request(model, tmp_path / "out", None, method="drop-reap"), Silent())
    result = prune(request(model, tmp_path / "auto", None), Silent())
    assert result.manifest.method == "block-magnitude"


def test_nan_weights_are_named(texts: Path, tmp_path: Path) -> None:
    """The tensor and the file are in the message; nothing appears at the output."""
    model = make_model(tmp_path / "m", "qwen3_moe")
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    weights[name][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        prune(request(model, tmp_path / "out", texts), Silent())
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_with_other_settings_is_not_mixed(texts: Path, tmp_path: Path) -> None:
    """The differing setting is named, and the way out."""
    model = make_model(tmp_path / "m", "mixtral")
    partial = tmp_path / "out.partial" / "work"
    partial.mkdir(parents=True)
    (partial / "journal.json").write_text(json.dumps({"run": {"keep": 0.3}, "done": {}}))
    with pytest.raises(OutputError, match=r"other settings.*keep"):
        prune(request(model, tmp_path / "out", texts), Silent())


def test_a_full_disk_is_said_before_the_work(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is needed and what is free."""
    model = make_model(tmp_path / "m", "mixtral")
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: real._replace(free=1000))
    with pytest.raises(OutputError, match="GB on disk"):
        prune(request(model, tmp_path / "out", texts), Silent())
    monkeypatch.undo()
    prune(request(model, tmp_path / "out", texts), Silent())


def test_verify_finds_a_flipped_byte(texts: Path, tmp_path: Path) -> None:
    """One bit in one weight."""
    model = make_model(tmp_path / "m", "mixtral")
    out = tmp_path / "out"
    prune(request(model, out, texts, method="drop-reap"), Silent())
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    found = verify(out, model, Silent())
    assert any("SHA-256" in problem for problem in found.problems)
    assert not found.passed
