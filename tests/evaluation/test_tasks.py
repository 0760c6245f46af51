"""lm-eval's tasks over both kinds of model, offline, with the pack in this repository."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.registry import get_model
from lm_eval.evaluator import evaluate

from benchmarks.tasks import build
from moe_serve.calibration.passages import Known, passages
from moe_serve.errors import UsageError
from moe_serve.evaluation import harness
from moe_serve.evaluation.models import Model, opened
from moe_serve.evaluation.stored import StoredModel
from moe_serve.evaluation.tasks import compare_tasks, known_of
from moe_serve.progress import SILENT
from tests.support.computed import Computed
from tests.support.models import make_model

CPU = torch.device("cpu")
PACK = Path(build.__file__).parent


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with room for the pack's items."""
    made = tmp_path_factory.mktemp("models") / "a"
    return make_model(made, "qwen3_moe", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    """By its directory."""
    return StoredModel.at(path, CPU, 4096)


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Computed]:
    """The same by URL."""
    with Computed(path) as served:
        yield served


def test_the_pack_is_what_its_script_makes() -> None:
    """Byte for byte; every item names its licence and has one answer among four."""
    for name in build.TASKS:
        text = (PACK / f"{name}.jsonl").read_text(encoding="utf-8")
        assert text == build.build(name)
        items = [json.loads(line) for line in text.splitlines()]
        assert len(items) >= 100
        for item in items:
            assert item["licence"]
            assert len(set(item["choices"])) == 4
            assert 0 <= item["answer"] < 4
        counts = [sum(item["answer"] == n for item in items) for n in range(4)]
        assert max(counts) - min(counts) <= len(build.TASKS[name][0]), "places give nothing away"


def test_a_model_and_itself(model: Model) -> None:
    """All tasks of the pack; no difference, no doubt, and a mean over tasks."""
    found = compare_tasks(model, model, [str(PACK)], 3, SILENT)
    assert {row["task"] for row in found["tasks"]} == {f"moe_serve_{name}" for name in build.TASKS}
    for row in [*found["tasks"], found["mean"]["acc"]]:
        assert (row["difference"], row["verdict"], row["p"]) == (0.0, "same", 1.0)
        assert row["interval"] == {"low": 0.0, "high": 0.0, "half": 0.0}
    assert found["mean"]["acc"]["items"] == 3 * len(build.TASKS)


def test_engine_and_directory_agree(model: Model, engine: Computed) -> None:
    """Item by item; and so does lm-eval's own client of completions."""
    task = str(PACK / "cloze.yaml")
    here = harness.measure(model, harness.load(task), 4, SILENT)
    with opened(engine.url, CPU, 4096, 2) as served:
        there = harness.measure(served, harness.load(task), 4, SILENT)
    client = get_model("local-completions")(
        base_url=f"{engine.url}/v1/completions",
        model="m",
        tokenizer=model.name,
        tokenizer_backend="huggingface",
    )
    own = evaluate(client, harness.load(task), limit=4, bootstrap_iters=0)
    samples = sorted(own["samples"]["moe_serve_cloze"], key=lambda sample: sample["doc_id"])
    for mine, theirs, direct in zip(
        here.answers["moe_serve_cloze"],
        there.answers["moe_serve_cloze"],
        [sample["resps"] for sample in samples],
        strict=True,
    ):
        assert logs(mine) == pytest.approx(logs(theirs), abs=1e-4)
        assert logs(mine) == pytest.approx(logs(direct), abs=1e-4)
    assert here.values == there.values


def logs(answers: Any) -> list[float]:
    """The log-likelihood of each choice."""
    return [answer[0][0] for answer in answers]


def written(folder: Path, **settings: Any) -> Path:
    """A task of two items in a folder of its own, data beside it."""
    folder.mkdir()
    rows = [{"text": "abc def", "last": " ghi"}, {"text": "q: 6*7?", "last": "42"}]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{last}}",
        "target_delimiter": "",
        **settings,
    }
    (folder / "mine.yaml").write_text(json.dumps(task))
    return folder


def test_log_likelihoods_are_compared_in_nats(tmp_path: Path, model: Model) -> None:
    """lm-eval calls them perplexity per item, lower is better; here they are what they are."""
    shown = [{"metric": "perplexity", "higher_is_better": False}, {"metric": "acc"}]
    task = written(tmp_path / "t", output_type="loglikelihood", metric_list=shown)
    rows = compare_tasks(model, model, [str(task)], None, SILENT)["tasks"]
    (row,) = [row for row in rows if row["metric"] == "log_likelihood_nats"]
    assert row["original"] < 0
    assert row["higher_is_better"]
    assert row["only_original"] is None


def test_items_without_a_number_are_left_out(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And counted; a NaN is neither below nor above an interval, so that it was called worse."""
    shown = [{"metric": "perplexity", "higher_is_better": False}, {"metric": "acc"}]
    task = written(tmp_path / "t", output_type="loglikelihood", metric_list=shown)
    real = harness.measure

    def spoilt(*arguments: Any) -> harness.Measured:
        found = real(*arguments)
        first = {key: (float("nan"), *row[1:]) for key, row in found.values.items()}
        every = {key: (float("nan"),) * 2 for key in found.values if key[1] == "acc"}
        return replace(found, values=first | every)

    monkeypatch.setattr(harness, "measure", spoilt)
    (row,) = compare_tasks(model, model, [str(task)], None, SILENT)["tasks"]
    assert (row["metric"], row["items"], row["left_out"]) == ("log_likelihood_nats", 1, 1)
    assert row["verdict"] != "worse"


def test_whole_texts_are_one_number_each(tmp_path: Path, model: Model) -> None:
    """Windows shorter than the text add up to the text's log-likelihood, each token once."""
    task = written(
        tmp_path / "t",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    (answer, _) = harness.measure(model, harness.load(str(task)), None, SILENT).answers["mine"]
    ids = model.tokenize("abc def")
    (places,) = model.expect([[0, *ids]], 1, SILENT)
    whole = sum(place.listed[i] for place, i in zip(places, ids, strict=True))
    assert answer[0][0] == pytest.approx(whole, abs=1e-4)


def test_writing_needs_an_engine(tmp_path: Path, model: Model, engine: Computed) -> None:
    """The engine stops before the stop word; a directory is refused by name."""
    task = written(
        tmp_path / "t",
        output_type="generate_until",
        generation_kwargs={"until": [", not"]},
        metric_list=[{"metric": "exact_match"}],
    )
    with opened(engine.url, CPU, 4096, 2) as served:
        found = harness.measure(served, harness.load(str(task)), None, SILENT)
    assert found.answers["mine"] == [[["42"]], [["42"]]]
    assert found.values["mine", "exact_match"] == (0.0, 1.0)
    with pytest.raises(UsageError, match="lets the model write"):
        harness.measure(model, harness.load(str(task)), None, SILENT)


def test_items_that_were_calibrated_on() -> None:
    """The pack is from the held-out texts: who calibrated on those is told so, by task."""
    rows = [json.loads(line) for line in build.TEXTS.read_text(encoding="utf-8").splitlines()]
    texts = harness.strings_of(harness.load(str(PACK / "following.yaml")))
    every = Known.of(passages(row["text"]) for row in rows)
    assert known_of(texts, [every]) == ["moe_serve_following"]
    others = Known.of(passages(row["text"]) for row in rows if row["domain"] == "c")
    assert known_of(texts, [others]) == []


def test_what_is_no_task(tmp_path: Path) -> None:
    """A file that is not there, a folder without any, a file that is something else."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.yaml").write_text("a: 1")
    for name, words in (
        ("nowhere.yaml", "is not there"),
        ("empty", "holds no task file"),
        ("other.yaml", "can't be loaded"),
    ):
        with pytest.raises(UsageError, match=words):
            harness.load(str(tmp_path / name))
