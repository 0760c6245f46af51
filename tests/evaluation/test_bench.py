"""Result files of four load generators, in the shapes that they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_serve.errors import UsageError
from moe_serve.evaluation.bench import speed
from moe_serve.evaluation.results import TOOLS


def vllm(factor: float, **other: Any) -> dict[str, Any]:
    """Of vLLM 0.32: times of ``factor`` milliseconds and its multiples, rates of their inverse."""
    times = {
        f"{statistic}_{name}_ms": factor * scale
        for name in ("ttft", "tpot", "itl")
        for statistic, scale in (("mean", 2.0), ("median", 1.0), ("p99", 8.0), ("std", 1.0))
    }
    rates = {"request_throughput": 10 / factor, "output_throughput": 100 / factor}
    shape = {"completed": 10, "failed": 0, "num_prompts": 10, "total_input_tokens": 100}
    return {**times, **rates, "total_token_throughput": 200 / factor, **shape, **other}


def summary(value: float, names: dict[str, str], **more: Any) -> dict[str, Any]:
    """A distribution with mean, median and 99th percentile of 2, 1 and 8 times ``value``."""
    scale = {"mean": 2.0, "p50": 1.0, "p99": 8.0}
    return {names.get(name, name): value * factor for name, factor in scale.items()} | more


def guidellm(factor: float) -> dict[str, Any]:
    """Of GuideLLM 0.7: milliseconds but for the latency; percentiles one level down."""

    def by_status(value: float) -> dict[str, Any]:
        percentiles = {"p50": value, "p90": 5 * value, "p99": 8 * value}
        found = {"mean": 2 * value, "median": value, "count": 9, "percentiles": percentiles}
        return {"successful": found, "incomplete": None, "errored": None}

    metrics = {
        "request_totals": {"successful": 9, "incomplete": 0, "errored": 1, "total": 10},
        "request_latency": by_status(factor / 1000),
        "prompt_token_count": by_status(64),
        "output_token_count": by_status(32),
        "requests_per_second": by_status(5 / factor),
        "output_tokens_per_second": by_status(50 / factor),
        "tokens_per_second": by_status(100 / factor),
    }
    for name in ("time_to_first_token", "time_per_output_token", "inter_token_latency"):
        metrics[f"{name}_ms"] = by_status(factor)
    run = {"config": {"strategy": {"type_": "concurrent", "streams": 4}}, "metrics": metrics}
    return {
        "metadata": {"version": 2, "guidellm_version": "0.7.0"},
        "config": {},
        "benchmarks": [run],
    }


def aiperf(factor: float, unit: str = "ms") -> dict[str, Any]:
    """Of AIPerf's schema 1.5: a unit beside each figure, the mean as ``avg``."""
    scale = {"ms": 1.0, "us": 1000.0}[unit]
    times = {
        name: summary(factor * scale, {"mean": "avg"}, unit=unit, count=10)
        for name in ("time_to_first_token", "inter_token_latency", "request_latency")
    }
    rates = {
        "request_throughput": {"unit": "requests/sec", "avg": 10 / factor},
        "output_token_throughput": {"unit": "tokens/sec", "avg": 100 / factor},
        "total_token_throughput": {"unit": "tokens/sec", "avg": 200 / factor},
    }
    counts = {"request_count": {"unit": "requests", "avg": 10.0}}
    return {"schema_version": "1.5", "aiperf_version": "0.6.0", **times, **rates, **counts}


def inference_perf(factor: float) -> dict[str, Any]:
    """Of inference-perf 0.3: seconds, the median by that name, latencies below the successes."""
    names = (
        "request_latency",
        "normalized_time_per_output_token",
        "time_per_output_token",
        "time_to_first_token",
        "inter_token_latency",
    )
    latency = {name: summary(factor / 1000, {"p50": "median"}) for name in names}
    rates = {
        "input_tokens_per_sec": 100 / factor,
        "output_tokens_per_sec": 100 / factor,
        "total_tokens_per_sec": 200 / factor,
        "requests_per_sec": 10 / factor,
    }
    lengths = {"prompt_len": {"mean": 64.0}, "output_len": {"mean": 32.0}}
    return {
        "load_summary": {"count": 11, "schedule_delay": {"mean": 0.1}},
        "successes": {"count": 10, "latency": latency, "throughput": rates, **lengths},
        "failures": {"count": 1, "request_latency": None, "prompt_len": None},
    }


MADE = {
    "vllm bench serve": vllm,
    "GuideLLM": guidellm,
    "AIPerf": aiperf,
    "inference-perf": inference_perf,
}
TIMES = {
    "vllm bench serve": {"ttft", "tpot", "itl"},
    "GuideLLM": {"ttft", "tpot_by_token", "tpot_with_first_by_token", "e2el"},
    "AIPerf": {"ttft", "tpot", "e2el"},
    "inference-perf": {"ttft", "tpot", "tpot_with_first", "itl", "e2el"},
}


def written(path: Path, content: dict[str, Any]) -> Path:
    """As a file."""
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", [tool.name for tool in TOOLS])
def test_figures_with_units_and_ratios(tmp_path: Path, name: str) -> None:
    """A pruned model at half the time: in milliseconds, ratios of 0.5; rates of 2."""
    one, other = (written(tmp_path / f"{f}.json", MADE[name](f)) for f in (4.0, 2.0))
    found = speed(one, other)
    assert found["tool"] == name
    assert set(found["latency"]) == TIMES[name]
    for row in found["latency"].values():
        assert row["unit"] == "ms"
        half = {"ratio": pytest.approx(0.5)}
        at = row["statistics"]
        assert at["mean"] == half | {"original": pytest.approx(8), "pruned": pytest.approx(4)}
        assert at["p50"] == half | {"original": pytest.approx(4), "pruned": pytest.approx(2)}
        assert at["p99"] == half | {"original": pytest.approx(32), "pruned": pytest.approx(16)}
    assert set(found["throughput"]) == {
        "request_throughput",
        "output_throughput",
        "total_token_throughput",
    }
    rate = found["throughput"]["output_throughput"]
    assert (rate["unit"], rate["original"], rate["pruned"]) == ("tokens/s", 25.0, 50.0)
    assert rate["ratio"] == 2.0
    assert found["unlike"] == []


def test_the_first_token_is_told_apart(tmp_path: Path) -> None:
    """What GuideLLM calls time per output token holds the first, what others do does not."""
    for name, held in (("GuideLLM", "tpot_with_first_by_token"), ("inference-perf", "tpot")):
        file = written(tmp_path / "a.json", MADE[name](1.0))
        row = speed(file, file)["latency"][held]
        assert "time_per_output_token" in row["field"]
        assert ("with the first" in row["definition"]) == (name == "GuideLLM")


def test_the_unit_beside_a_figure_is_read(tmp_path: Path) -> None:
    """AIPerf's microseconds are milliseconds here; a unit that nobody knows is no figure."""
    one = written(tmp_path / "a.json", aiperf(4.0))
    other = written(tmp_path / "b.json", aiperf(2.0, "us"))
    row = speed(one, other)["latency"]["ttft"]["statistics"]["p50"]
    assert row == {"original": 4.0, "pruned": 2.0, "ratio": 0.5}
    odd = aiperf(4.0)
    odd["time_to_first_token"]["unit"] = "ticks"
    assert "ttft" not in speed(written(tmp_path / "c.json", odd), other)["latency"]


def test_other_workloads_are_named(tmp_path: Path) -> None:
    """Ten prompts against twenty say nothing of the models."""
    one = written(tmp_path / "a.json", vllm(1.0))
    other = written(tmp_path / "b.json", vllm(1.0, num_prompts=20))
    assert speed(one, other)["unlike"] == ["num_prompts"]


def test_two_tools_are_not_compared(tmp_path: Path) -> None:
    """They measure different things."""
    one = written(tmp_path / "a.json", vllm(1.0))
    other = written(tmp_path / "b.json", aiperf(1.0))
    with pytest.raises(UsageError, match=r"one is of vllm bench serve, the other of AIPerf"):
        speed(one, other)


SWEEP = guidellm(1.0)
SWEEP["benchmarks"] *= 2
OLD = guidellm(1.0) | {"metadata": None}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": 1}, "not a result"),
        (OLD, "not a result"),
        (SWEEP, "not exactly one run"),
        (vllm(1.0, completed=0), "no request was completed"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    """By name."""
    good, bad = written(tmp_path / "a.json", vllm(1.0)), written(tmp_path / "b.json", content)
    with pytest.raises(UsageError, match=words) as caught:
        speed(good, bad)
    assert "b.json" in str(caught.value)
