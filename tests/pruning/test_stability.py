"""A calibration that stops when the plan no longer changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_serve.calibration.store import RECORD, TENSORS, Statistics
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.cli.app import app
from moe_serve.errors import UsageError
from moe_serve.progress import SILENT
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.gathering import calibrate
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.selection import Selection
from moe_serve.pruning.stability import Stable, calibrate_until_stable, errors, regret
from tests.support.models import make_model, write_texts

SELECTION = Selection(method="block-obs", keep=0.5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its texts, and calibrations on 64 and on 1,024 tokens of each domain."""
    root = tmp_path_factory.mktemp("stability")
    make_model(root / "m", "qwen3_moe")
    write_texts(root / "texts.jsonl")
    for tokens in (64, 1024):
        calibrate(root / "m", root / str(tokens), texts(root, tokens))
    return root


def texts(root: Path, tokens: int) -> TextOptions:
    """So many tokens of each domain."""
    return TextOptions(paths=(root / "texts.jsonl",), tokens=tokens, length=64)


def plan(root: Path, tokens: int) -> Plan:
    """Half of the bytes, by one of the calibrations."""
    checkpoint = open_checkpoint(root / "m")
    return make_plan(checkpoint, Statistics(root / str(tokens)), SELECTION, SILENT)


def test_regret_is_what_the_plans_themselves_say(root: Path) -> None:
    """A plan's own error, recomputed from what it keeps, is what it wrote down.

    Older over newer: both errors by the newer statistics; against itself a plan loses nothing.
    """
    checkpoint, newer = open_checkpoint(root / "m"), plan(root, 1024)
    statistics = Statistics(root / "1024")
    assert regret(checkpoint, statistics, newer, newer) == 0.0
    older = plan(root, 64)
    assert regret(checkpoint, statistics, older, newer) > 0.05
    whole = newer.model_copy(update={"layers": {}})
    written = sum(sum(layer.why["error_added"]) for layer in newer.layers.values())
    found = errors(checkpoint, statistics, (newer, whole))
    assert found == [pytest.approx(written, rel=1e-3), 0.0]
    # Each is the better one by its own statistics.
    assert regret(checkpoint, Statistics(root / "64"), newer, older) > 0.0


def stop(root: Path, output: Path, tolerance: float) -> tuple[Stable, list[int]]:
    """At most 1,024 tokens of each domain; also what was calibrated on, in order."""
    taken: list[int] = []

    def gather(folder: Path, options: TextOptions) -> Statistics:
        taken.append(options.tokens)
        # Statistics of large models fill disks: those of the steps before are gone.
        assert not list(folder.parent.glob(f"tokens-*/{TENSORS}"))
        return calibrate(root / "m", folder, options)

    found = calibrate_until_stable(root / "m", output, texts(root, 1024), 0.5, tolerance, gather)
    return found, taken


def test_it_stops_when_the_plan_settles(root: Path, tmp_path: Path) -> None:
    """With the bytes of a calibration on that many tokens; nothing else is left."""
    found, taken = stop(root, tmp_path / "out", 0.9)
    assert taken == [64, 128]
    assert found.settled
    assert found.steps[0].regret is None
    assert [step.observed for step in found.steps] == [128, 256]
    alone = calibrate(root / "m", tmp_path / "alone", texts(root, 128))
    for name in (TENSORS, RECORD):
        assert (tmp_path / "out" / name).read_bytes() == (alone.folder / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "out"]


def test_it_says_when_the_tokens_run_out(root: Path, tmp_path: Path) -> None:
    """Each time twice as many; the last plan still differed."""
    found, taken = stop(root, tmp_path / "out", 1e-9)
    assert taken == [64, 128, 256, 512, 1024]
    assert not found.settled
    changes = [step.regret for step in found.steps[1:]]
    assert all(change is not None and change > 0 for change in changes)


def test_a_killed_run_goes_on(root: Path, tmp_path: Path) -> None:
    """What was finished is not calibrated again."""

    def killed(folder: Path, options: TextOptions) -> Statistics:
        if options.tokens > 64:
            raise KeyboardInterrupt
        return calibrate(root / "m", folder, options)

    with pytest.raises(KeyboardInterrupt):
        calibrate_until_stable(root / "m", tmp_path / "out", texts(root, 1024), 0.5, 0.9, killed)
    _, taken = stop(root, tmp_path / "out", 0.9)
    assert taken == [128]


def test_the_command(root: Path, tmp_path: Path) -> None:
    """Says what it saved; a share of a calibration is refused."""
    common = ["calibrate", str(root / "m"), str(tmp_path / "out"), "--until-stable", "0.5"]
    more = ["--calibration", str(root / "texts.jsonl"), "--tokens", "1024"]
    sizes = ["--sequence-length", "64", "--tolerance", "0.9", "--device", "cpu"]
    refused = CliRunner().invoke(app, [*common, *more, *sizes, "--shard", "1/2"])
    assert isinstance(refused.exception, UsageError)
    done = CliRunner().invoke(app, [*common, *more, *sizes, "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)["until_stable"]
    assert (found["settled"], found["tokens"], found["allowed"]) == (True, 128, 1024)
