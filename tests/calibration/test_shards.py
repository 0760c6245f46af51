"""Calibrating in shards or in several processes, and adding up."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_serve.calibration.gradients import LayerGradients
from moe_serve.calibration.merge import merge_statistics
from moe_serve.calibration.share import WHOLE, Share
from moe_serve.calibration.statistics import LayerStatistics
from moe_serve.calibration.store import TENSORS, Statistics
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import CalibrationError, UsageError
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.gathering import calibrate
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.selection import Selection
from tests.support.models import make_model, write_texts

CPU = torch.device("cpu")
SHARDS = 4
BOUND = 1e-5
"""Largest difference of a sum, as a share of the tensor's largest entry.

A token's own numbers differ in FP32's last bits with the shape of the batch it is in (2⁻²⁴ each
over sums of at most a few hundred terms); the order of the sums adds as little.
"""


def observed(model: Path, texts: Path, out: Path, share: Share = WHOLE) -> Statistics:
    """Calibrate on 1,600 tokens in 26 sequences."""
    options = TextOptions(paths=(texts,), tokens=800, length=64)
    return calibrate(model, out, options, CPU, 256, Silent(), share)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of eight experts."""
    return make_model(tmp_path_factory.mktemp("model") / "m", "qwen3_moe")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains."""
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="module")
def whole(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """From one machine."""
    return observed(model, texts, tmp_path_factory.mktemp("whole") / "s")


@pytest.fixture(scope="module")
def shards(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """From four."""
    folder = tmp_path_factory.mktemp("shards")
    found = [observed(model, texts, folder / str(i), Share(i, SHARDS)) for i in range(SHARDS)]
    return [statistics.folder for statistics in found]


def assert_same(a: LayerStatistics | LayerGradients, b: LayerStatistics | LayerGradients) -> None:
    """Counts and reservoir domains exactly, sums within the bound."""
    for name, tensor in a.tensors().items():
        other = b.tensors()[name]
        if name in ("count_CN", "reservoir_domain_S"):
            assert torch.equal(tensor, other)
        else:
            assert float((tensor - other).abs().max()) <= BOUND * float(tensor.abs().max()), name


def assert_same_plan(model: Path, a: Statistics, b: Statistics) -> None:
    """Block by block and neuron by neuron, whatever the order of sums."""
    plans = [
        make_plan(open_checkpoint(model), s, Selection(keep=0.5), Silent()).layers for s in (a, b)
    ]
    parts = [{i: [b.parts for b in p.blocks] for i, p in layers.items()} for layers in plans]
    assert parts[0] == parts[1]
    assert [p.experts for p in plans[0].values()] == [p.experts for p in plans[1].values()]


def test_four_shards_make_the_plan_of_one_machine(
    model: Path, whole: Statistics, shards: list[Path], tmp_path: Path
) -> None:
    """Statistics and gradients within the bound, whatever the order the shards are given in."""
    merged = merge_statistics(shards, tmp_path / "a", Silent())
    again = merge_statistics(shards[::-1], tmp_path / "b", Silent())
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()
    for layer in (0, 1):
        assert_same(whole.layer(layer), merged.layer(layer))
        assert_same(whole.gradients(layer), merged.gradients(layer))
    assert_same_plan(model, whole, again)
    described = [{k: v for k, v in s.record.items() if k != "sha256"} for s in (whole, merged)]
    assert described[0] == described[1]


def test_processes_of_torchrun_share_the_work(
    model: Path, texts: Path, whole: Statistics, tmp_path: Path
) -> None:
    """Two processes and an all-reduce; only the output is left."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "moe_serve", "calibrate", str(model), str(tmp_path / "s"), "--json"),
        *("--calibration", str(texts), "--tokens", "800", "--sequence-length", "64"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    found = Statistics(tmp_path / "s")
    for layer in (0, 1):
        assert_same(whole.layer(layer), found.layer(layer))
        assert_same(whole.gradients(layer), found.gradients(layer))
    assert_same_plan(model, whole, found)


def test_every_shard_is_needed_once(shards: list[Path], tmp_path: Path) -> None:
    """Which one is missing, or twice."""
    with pytest.raises(CalibrationError, match="shards 2/4 are missing"):
        merge_statistics([shards[0], *shards[2:]], tmp_path / "out", Silent())
    with pytest.raises(CalibrationError, match="is shard 1/4, and so is"):
        merge_statistics([*shards, shards[0]], tmp_path / "out", Silent())


def test_shards_of_other_texts_are_refused(model: Path, shards: list[Path], tmp_path: Path) -> None:
    """The record says what differs."""
    texts = write_texts(tmp_path / "t.jsonl", seed=1)
    other = observed(model, texts, tmp_path / "s", Share(3, SHARDS)).folder
    with pytest.raises(CalibrationError, match="differs in passages, sources, tokens_sha256"):
        merge_statistics([*shards[:3], other], tmp_path / "out", Silent())


def test_a_damaged_shard_is_refused(shards: list[Path], tmp_path: Path) -> None:
    """One bit; nothing appears at the output."""
    copy = tmp_path / "copy"
    shutil.copytree(shards[3], copy)
    data = bytearray((copy / TENSORS).read_bytes())
    data[-200] ^= 1
    (copy / TENSORS).write_bytes(data)
    with pytest.raises(CalibrationError, match=r"is not what statistics\.json says"):
        merge_statistics([*shards[:3], copy], tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_a_shard_alone_makes_no_plan(model: Path, shards: list[Path]) -> None:
    """Its sums are a part; the way out is named."""
    with pytest.raises(CalibrationError, match=r"shard 1/4.*merge-statistics"):
        make_plan(open_checkpoint(model), Statistics(shards[0]), Selection(keep=0.5), Silent())


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "-1/2"])
def test_what_is_no_share_is_refused(text: str) -> None:
    """With an example of what is one."""
    with pytest.raises(UsageError, match="1/4"):
        Share.parse(text)


def test_shares_are_a_partition() -> None:
    """Shares of shares, too: each sequence belongs to exactly one."""
    numbers = [
        number
        for shard in range(3)
        for rank in range(2)
        for number in Share(shard, 3).part(rank, 2).numbers(20)
    ]
    assert sorted(numbers) == list(range(20))
    with pytest.raises(UsageError, match="at most 2 shards"):
        Share(2, 3).numbers(2)
