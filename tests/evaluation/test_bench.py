"""Result files of ``vllm bench serve``, in the shape that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_serve.errors import UsageError
from moe_serve.evaluation.bench import speed


def result(factor: float, **other: Any) -> dict[str, Any]:
    """Times of ``factor`` milliseconds and its multiples, rates of their inverse."""
    times = {
        f"{statistic}_{name}_ms": factor * scale
        for name in ("ttft", "tpot", "itl")
        for statistic, scale in (("mean", 2.0), ("median", 1.0), ("p99", 8.0), ("std", 1.0))
    }
    rates = {"request_throughput": 10 / factor, "output_throughput": 100 / factor}
    shape = {"completed": 10, "failed": 0, "num_prompts": 10, "total_input_tokens": 100}
    return {**times, **rates, "total_token_throughput": 200 / factor, **shape, **other}


def written(path: Path, content: dict[str, Any]) -> Path:
    """As a file."""
    path.write_text(json.dumps(content))
    return path


def test_figures_with_units_and_ratios(tmp_path: Path) -> None:
    """A pruned model at half the time: ratios of 0.5, rates of 2; e2el is not in the files."""
    one, other = (written(tmp_path / f"{f}.json", result(f)) for f in (4.0, 2.0))
    found = speed(one, other)
    assert set(found["latency"]) == {"ttft", "tpot", "itl"}
    tpot = found["latency"]["tpot"]
    assert tpot["unit"] == "ms"
    assert "without the first" in tpot["definition"]
    assert tpot["statistics"]["p50"] == {"original": 4.0, "pruned": 2.0, "ratio": 0.5}
    assert tpot["statistics"]["p99"] == {"original": 32.0, "pruned": 16.0, "ratio": 0.5}
    rate = found["throughput"]["output_throughput"]
    assert (rate["unit"], rate["original"], rate["pruned"]) == ("tokens/s", 25.0, 50.0)
    assert rate["ratio"] == 2.0
    assert found["unlike"] == []


def test_other_workloads_are_named(tmp_path: Path) -> None:
    """Ten prompts against twenty say nothing of the models."""
    one = written(tmp_path / "a.json", result(1.0))
    other = written(tmp_path / "b.json", result(1.0, num_prompts=20))
    assert speed(one, other)["unlike"] == ["num_prompts"]


@pytest.mark.parametrize(
    ("content", "words"),
    [({"a": 1}, "not a result"), (result(1.0, completed=0), "no request was completed")],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    """By name."""
    good, bad = written(tmp_path / "a.json", result(1.0)), written(tmp_path / "b.json", content)
    with pytest.raises(UsageError, match=words) as caught:
        speed(good, bad)
    assert "b.json" in str(caught.value)
