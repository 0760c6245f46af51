"""A model by directory and the same one by URL answer alike; each can stand on either side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_serve.checkpoint import staging
from moe_serve.errors import OutputError, UsageError
from moe_serve.evaluation.comparison import compare
from moe_serve.evaluation.measure import Wanted, measure
from moe_serve.evaluation.stored import StoredModel
from moe_serve.progress import SILENT
from moe_serve.pruning.corpus import TextOptions
from tests.support.computed import Computed
from tests.support.models import change_weights, make_model, write_texts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model."""
    return make_model(tmp_path_factory.mktemp("models") / "original", "qwen3_moe")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with experts of twice the output."""
    path = make_model(tmp_path_factory.mktemp("models") / "other", "qwen3_moe")

    def double(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            if "experts" in name and "down_proj" in name:
                weight.mul_(2)

    change_weights(path, double)
    return path


@pytest.fixture(scope="module")
def engine(other: Path) -> Iterator[Computed]:
    """Serves the other."""
    with Computed(other) as served:
        yield served


@pytest.fixture
def texts(tmp_path: Path) -> TextOptions:
    """Two domains."""
    return TextOptions(paths=(write_texts(tmp_path / "texts.jsonl"),), tokens=256, length=64)


def test_places_are_transformers_own(original: Path) -> None:
    """Log-probability of each token that stands there and of the likeliest; rows in any order."""
    rows = [[5, 6, 7, 8, 9], [1, 2], list(range(1, 41))]
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    found = list(StoredModel.at(original, CPU, 64).expect(rows, 3, SILENT))
    for ids, places in zip(rows, found, strict=True):
        with torch.inference_mode():
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
        assert len(places) == len(ids) - 1
        for place, row, token in zip(places, logs, ids[1:], strict=False):
            assert place.listed[token] == pytest.approx(float(row[token]), abs=1e-4)
            assert place.first == int(row.argmax())
            assert place.least == pytest.approx(float(row.topk(3).values[-1]), abs=1e-4)


def test_rows_that_no_disk_holds_are_refused_first(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice 64 tokens (41, filled up) of 64 numbers of four bytes; what to do is said."""
    monkeypatch.setattr(staging, "free_bytes", lambda _path: 20_000)
    with pytest.raises(OutputError, match="set TMPDIR to a folder on a larger disk, or ask"):
        list(StoredModel.at(original, CPU, 64).expect([list(range(1, 42))], 3, SILENT))
    monkeypatch.setattr(staging, "free_bytes", lambda _path: 33_000)
    assert list(StoredModel.at(original, CPU, 64).expect([list(range(1, 42))], 3, SILENT))


def test_a_directory_against_an_engine(
    original: Path, other: Path, engine: Computed, texts: TextOptions
) -> None:
    """The figures of both directories; with all tokens listed the bound is KL itself."""
    exact = compare(original, other, texts)
    assert exact.mean.kl_nats > 0.01
    wanted = Wanted(original=str(original), pruned=engine.url, texts=texts, top=512)
    mixed = measure(wanted, SILENT)
    for name, quality in exact.domains.items():
        found = mixed.domains[name].figures
        assert found.kl_nats == pytest.approx(quality.figures.kl_nats, rel=1e-3)
        ratio = quality.figures.perplexity_ratio
        assert found.perplexity_ratio == pytest.approx(ratio, rel=1e-4)
    back = measure(
        Wanted(original=engine.url, pruned=str(other), texts=texts, top=20, concurrency=2), SILENT
    )
    assert back.mean.kl_nats == pytest.approx(0.0, abs=1e-6)
    assert back.mean.top1_agreement == 1.0


def test_prompts_need_two_engines(original: Path, engine: Computed, texts: TextOptions) -> None:
    """Before anything is measured."""
    wanted = Wanted(original=str(original), pruned=engine.url, texts=texts, prompts=texts.paths[0])
    with pytest.raises(UsageError, match="two engines"):
        measure(wanted, SILENT)
