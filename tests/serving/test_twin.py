"""``verify --engine``: a compact checkpoint and its tied form in vLLM."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_serve.checkpoint.export import export
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.cli import files
from moe_serve.cli.app import app
from moe_serve.errors import UsageError
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from moe_serve.serving.reference import forced_logprobs
from moe_serve.serving.twin import Agreement, compare_with_twin, difference
from tests.support.calibrated import calibrated
from tests.support.models import make_model, write_texts
from tests.support.references import reference_logprobs


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint pruned to half."""
    root = tmp_path_factory.mktemp("twin")
    request = PruneRequest(
        model=make_model(root / "m", "qwen3_moe"),
        output=root / "out",
        texts=TextOptions(paths=(write_texts(root / "t.jsonl"),), tokens=512, length=128),
        selection=Selection(keep=0.5),
        batch_tokens=512,
    )
    prune(request, Silent())
    return root / "out"


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts dropped in layer 0, three in layer 1."""
    root = tmp_path_factory.mktemp("uneven")
    model = make_model(root / "m", "qwen3_moe")
    checkpoint, statistics = open_checkpoint(model), calibrated(model, root)
    plans = [
        make_plan(checkpoint, statistics, Selection(experts=kept, method="drop-reap"), Silent())
        for kept in (6, 5)
    ]
    layers = {0: plans[0].layers[0], 1: plans[1].layers[1]}
    plans[0].model_copy(update={"layers": layers}).save(root / "plan.json")
    request = PruneRequest(
        model=model,
        output=root / "out",
        texts=TextOptions(paths=(root / "texts.jsonl",), tokens=512, length=128),
        selection=Selection(experts=6, method="drop-reap"),
        batch_tokens=512,
        plan=root / "plan.json",
    )
    prune(request, Silent())
    return root / "out"


def test_the_largest_difference_counts() -> None:
    """Over all rows: |-1.5 - -1.25| = 0.25."""
    ours = [[(7, -1.5), (8, -2.0)], [(9, -3.0)]]
    theirs = [[(7, -1.25), (8, -2.125)], [(9, -3.0)]]
    assert difference(ours, theirs) == Agreement(tokens=3, difference=0.25)


def test_nothing_is_compared_after_another_token() -> None:
    """What follows depends on it; the fork itself counts."""
    ours = [[(7, -1.0), (3, -1.0), (3, -9.0)]]
    theirs = [[(7, -1.0), (4, -1.5), (3, -1.0)]]
    assert difference(ours, theirs) == Agreement(tokens=2, difference=0.5)


def test_no_number_is_no_agreement() -> None:
    """NaN anywhere, or nothing to compare."""
    assert difference([[(1, math.nan), (2, -1.0)]], [[(1, -1.0), (2, -1.0)]]).difference == math.inf
    assert difference([], []).difference == math.inf


def test_a_stock_checkpoint_has_no_twin(tmp_path: Path) -> None:
    """It is refused before an engine starts."""
    with pytest.raises(UsageError, match="not a compact checkpoint"):
        compare_with_twin(make_model(tmp_path / "m", "qwen3_moe"), Silent())


@pytest.mark.parametrize(("apart", "code"), [(1e-6, 0), (1e-3, 1), (math.inf, 1)])
def test_a_difference_above_the_bound_fails(
    compact: Path, apart: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1, with the figure in the message; the default bound is 1e-4."""
    agreement = Agreement(tokens=10, difference=apart)
    monkeypatch.setattr(files, "compare_with_twin", lambda *_: agreement)
    done = CliRunner().invoke(app, ["verify", str(compact), "--engine"])
    assert done.exit_code == code, done.output
    assert f"{apart:.1e} nats" in " ".join(done.output.split())
    assert ("PROBLEM" in done.output) == bool(code)


def test_engines_agree(compact: Path) -> None:
    """Two real engines: (96 + 33 + 5) - 3 prompt tokens and 3 · 8 generated ones, 155 in all."""
    done = CliRunner().invoke(app, ["verify", str(compact), "--engine", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["passed"]
    assert told["engine"]["tokens"] == 155
    assert told["engine"]["difference"] <= 2e-5


def test_the_mask_is_added_as_transformers_would(uneven: Path, tmp_path: Path) -> None:
    """Log-probabilities of forced tokens against the whole model in transformers, masked."""
    tied = export(uneven, tmp_path / "tied", "tied", Silent())
    dropped = {i: list(t.dropped) for i, t in open_checkpoint(uneven).table.layers.items()}
    assert [len(experts) for experts in dropped.values()] == [2, 3]
    texts = [list(range(1, 40)), list(range(50, 53))]
    found = forced_logprobs(tied, texts)
    for row, expected in zip(found, reference_logprobs(tied, texts, dropped), strict=True):
        assert row == pytest.approx(expected, abs=2e-5)
    unmasked = reference_logprobs(tied, texts, {})
    assert max(abs(a - b) for a, b in zip(found[0], unmasked[0], strict=True)) > 1e-2


def test_uneven_drops_are_compared_too(uneven: Path) -> None:
    """One real engine, against the forward with the mask: 155 log-probabilities as above."""
    agreement = compare_with_twin(uneven, Silent())
    assert agreement.tokens == 155
    assert agreement.difference <= 5e-5
