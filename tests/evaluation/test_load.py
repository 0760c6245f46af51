"""Speed of two engines in one run, and what loading takes: figures by hand."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from moe_serve.errors import ServingError, UsageError
from moe_serve.evaluation.bench import paired, speed
from moe_serve.evaluation.load import Load, Timed, _Measured, _result, as_result, measure_load
from moe_serve.evaluation.measure import Wanted, measure
from moe_serve.evaluation.memory import held
from moe_serve.progress import SILENT
from moe_serve.pruning.corpus import TextOptions
from moe_serve.serving.client import ServedModel
from moe_serve.serving.ports import free_port
from tests.support.models import make_model, write_texts
from tests.support.upstream import Upstream

LOAD = Load(requests=4, prompt_tokens=8, answer_tokens=5, concurrency=2)


def test_definitions_by_arithmetic() -> None:
    """Two answers: pieces at 1, 2 and 4 s; one piece of three tokens at 3 s; 5 s in all.

    TTFT 1 and 3; without the first token (4 - 1) / 2 and (3 - 3) / 2; gaps 1 and 2; 6 tokens.
    """
    answers = [
        Timed(pieces=(1.0, 2.0, 4.0), end=4.0, tokens=3),
        Timed(pieces=(3.0,), end=3.0, tokens=3),
    ]
    measured = _Measured(seconds=5.0, answers=answers, failed=1)
    with httpx.Client() as client:
        engine = ServedModel(url="u", model="m", length=None, client=client)
        found = as_result(_result(engine, measured, LOAD))
    assert (found.completed, found.failed) == (2, 1)
    means = {name: row["mean"] for name, row in found.times.items()}
    assert means == {"ttft": 2000.0, "tpot": 750.0, "itl": 1500.0, "e2el": 3500.0}
    assert found.rates == {
        "request_throughput": 0.4,
        "output_throughput": 1.2,
        "total_token_throughput": (16 + 6) / 5,
    }


def test_two_engines_in_turn(tmp_path: Path) -> None:
    """Both get the same prompts, each its own; the files are read back as they were measured."""
    texts = write_texts(tmp_path / "texts.jsonl")
    files = (tmp_path / "a.json", tmp_path / "b.json")
    with Upstream("a", free_port(), pause=0.0) as a, Upstream("b", free_port(), pause=0.02) as b:
        urls = [f"http://127.0.0.1:{engine.port}" for engine in (a, b)]
        wanted = Wanted(
            original=urls[0],
            pruned=urls[1],
            texts=TextOptions(paths=(texts,), tokens=32, length=16),
            top=2,
            load=LOAD,
            results=files,
        )
        found = measure(wanted, SILENT)
        prompts = [[tuple(p) for p in engine.prompts] for engine in (a, b)]
    assert len(set(prompts[0])) == len(prompts[0]) == 6, "four, and two to warm up"
    assert sorted(prompts[0]) == sorted(prompts[1])
    again = speed(*files)
    for kind in ("throughput", "latency"):
        assert found.speed[kind] == again[kind]
    assert found.speed["completed"] == {"original": 4, "pruned": 4}
    assert found.speed["unlike"] == []
    whole = found.speed["latency"]["e2el"]["statistics"]["mean"]
    assert whole["pruned"] >= 380.0, "nineteen pauses of 20 ms, however busy the machine is"
    assert found.to_json()["speed"]["tool"] == "moe-serve compare --speed"


def test_an_engine_that_answers_nothing() -> None:
    """Is named; of one that fails now and then the failures are counted."""
    stream = list(range(100))
    with (
        Upstream("a", free_port(), pause=0.0) as a,
        Upstream("b", free_port(), pause=0.0) as b,
        httpx.Client() as client,
    ):
        engines = [ServedModel.at(f"http://127.0.0.1:{e.port}", client) for e in (a, b)]
        b.fail_every = 3
        contents = measure_load((engines[0], engines[1]), stream, LOAD, SILENT)
        assert paired(*map(as_result, contents))["failed"] == {"original": 0, "pruned": 2}
        b.fail_every = 1
        with pytest.raises(ServingError, match="completed none") as caught:
            measure_load((engines[0], engines[1]), stream, LOAD, SILENT)
        assert engines[1].url in str(caught.value)


def test_directories_are_loaded(tmp_path: Path) -> None:
    """A process of its own grows by the weights; a model of eight times the experts by more."""
    small = make_model(tmp_path / "small", "qwen3_moe", experts=8, width=512)
    large = make_model(tmp_path / "large", "qwen3_moe", experts=64, width=512)
    found = held(str(small), str(large))
    assert set(found) == {"load_seconds", "load_resident_bytes"}
    sizes = {
        side: (path / "model.safetensors").stat().st_size
        for side, path in (("original", small), ("pruned", large))
    }
    grown = found["load_resident_bytes"]
    for side, size in sizes.items():
        assert grown[side] == pytest.approx(size, rel=0.2, abs=2**21)
    assert all(found["load_seconds"][side] > 0 for side in sizes)
    json.dumps(found)


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    """Before anything is."""
    texts = TextOptions(paths=(tmp_path,))
    for more, words in (
        ({"results": (tmp_path, tmp_path), "load": LOAD}, "two engines"),
        ({"load": Load(requests=0)}, "--speed-requests: is 0; give 1 or more"),
        ({"concurrency": -2}, "--concurrency: is -2"),
        ({"task_limit": 0}, "--task-limit: is 0"),
    ):
        wanted = Wanted(original="a", pruned="b", texts=texts, **more)
        with pytest.raises(UsageError, match=words):
            measure(wanted, SILENT)
