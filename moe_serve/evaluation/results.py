"""Result files of load generators: where each keeps its figures, in which unit, and what they mean.

A tool is a row of a table. Names are by definition, not by what the tool says: what one calls time
per output token holds the first token, another's does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

Path_ = tuple[str, ...]

DEFINITIONS: Final = {
    "request_throughput": "completed requests over the run's duration",
    "output_throughput": "generated tokens over the run's duration",
    "total_token_throughput": "prompt and generated tokens over the run's duration",
    "ttft": "time to first token: from sending a request to its first token, per request",
    "tpot": "time per output token without the first: (latency - TTFT) / (tokens - 1), per request",
    "tpot_by_token": "time per output token without the first, as tpot; each request weighs as "
    "many times as it has such tokens",
    "tpot_with_first": "time per output token with the first: latency / tokens, per request",
    "tpot_with_first_by_token": "time per output token with the first, as tpot_with_first; each "
    "request weighs as many times as it has tokens",
    "itl": "inter-token latency: the gap between two pieces of a stream, each gap counted",
    "e2el": "end-to-end latency: from sending a request to its last token, per request",
}
"""Name → what it means."""
STATISTICS: Final = ("mean", "p50", "p99")
_SECONDS: Final = 1000.0
_UNITS: Final = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": _SECONDS, "sec": _SECONDS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One run's figures."""

    tool: str
    version: str | None
    completed: int
    failed: int
    rates: Mapping[str, float | None]
    """Requests or tokens per second."""
    times: Mapping[str, Mapping[str, float | None]]
    """Name → statistic → milliseconds."""
    fields: Mapping[str, str]
    """Name → what the tool calls it."""
    workload: Mapping[str, Any]
    """What must be alike for two runs to be about the models."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """Where a tool keeps what."""

    name: str
    how: str
    """How it comes to write such a file."""
    is_its: Callable[[Mapping[str, Any]], bool]
    run: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
    """The one run in a file; ``None``: there are several, or none."""
    version: Path_
    completed: Path_
    failed: Path_
    rates: Mapping[str, Path_]
    times: Mapping[str, Path_]
    statistic: Callable[[Path_, str], Path_]
    """A time's path and a statistic of ours → the path of its value."""
    scale: Callable[[Mapping[str, Any], Path_], float]
    """Milliseconds in the unit that a time is in."""
    workload: Mapping[str, Path_]

    def read(self, content: Mapping[str, Any]) -> Result | None:
        """The file's figures; ``None`` where it holds not exactly one run."""
        run = self.run(content)
        version = _at(content, self.version) if self.version else None
        return None if run is None else self.result(run, version)

    def result(self, run: Mapping[str, Any], version: object = None) -> Result:
        """One run's figures."""
        return Result(
            tool=self.name,
            version=None if version is None else str(version),
            completed=int(_number(_at(run, self.completed)) or 0),
            failed=int(_number(_at(run, self.failed)) or 0),
            rates={name: _number(_at(run, path)) for name, path in self.rates.items()},
            times={
                name: {
                    statistic: _scaled(
                        _at(run, self.statistic(path, statistic)), self.scale(run, path)
                    )
                    for statistic in STATISTICS
                }
                for name, path in self.times.items()
            },
            fields={name: ".".join(path) for name, path in {**self.rates, **self.times}.items()},
            workload={name: _at(run, path) for name, path in self.workload.items()},
        )


def _at(found: Any, path: Path_) -> Any:
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _scaled(value: object, scale: float) -> float | None:
    number = _number(value)
    return None if number is None else _number(number * scale)


def _whole(content: Mapping[str, Any]) -> Mapping[str, Any]:
    return content


def _only_benchmark(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    runs = content["benchmarks"]
    return runs[0] if isinstance(runs, list) and len(runs) == 1 else None


def _nested(**names: str) -> Callable[[Path_, str], Path_]:
    """A statistic below its time, under another name where one is given (dots go deeper)."""
    return lambda path, statistic: (*path, *names.get(statistic, statistic).split("."))


VLLM: Final = Tool(
    name="vllm bench serve",
    how="--save-result",
    is_its=lambda found: isinstance(found.get("output_throughput"), int | float),
    run=_whole,
    version=(),
    completed=("completed",),
    failed=("failed",),
    rates={
        name: (name,)
        for name in ("request_throughput", "output_throughput", "total_token_throughput")
    },
    times={name: (name,) for name in ("ttft", "tpot", "itl", "e2el")},
    statistic=lambda path, statistic: (
        f"{'median' if statistic == 'p50' else statistic}_{path[0]}_ms",
    ),
    scale=lambda _run, _path: 1.0,
    workload={
        name: (name,)
        for name in (
            "num_prompts",
            "request_rate",
            "burstiness",
            "max_concurrency",
            "total_input_tokens",
            "total_output_tokens",
            "tokenizer_id",
        )
    },
)

GUIDELLM: Final = Tool(
    name="GuideLLM",
    how="0.4 or later, with one rate: --output-path benchmarks.json",
    # Before 0.4 there was no version, and its time per token was another one.
    is_its=lambda found: (
        "benchmarks" in found and bool(_at(found, ("metadata", "guidellm_version")))
    ),
    run=_only_benchmark,
    version=("metadata", "guidellm_version"),
    completed=("metrics", "request_totals", "successful"),
    failed=("metrics", "request_totals", "errored"),
    rates={
        "request_throughput": ("metrics", "requests_per_second", "successful", "mean"),
        "output_throughput": ("metrics", "output_tokens_per_second", "successful", "mean"),
        "total_token_throughput": ("metrics", "tokens_per_second", "successful", "mean"),
    },
    times={
        "ttft": ("metrics", "time_to_first_token_ms", "successful"),
        "tpot_by_token": ("metrics", "inter_token_latency_ms", "successful"),
        "tpot_with_first_by_token": ("metrics", "time_per_output_token_ms", "successful"),
        "e2el": ("metrics", "request_latency", "successful"),
    },
    statistic=_nested(p50="percentiles.p50", p99="percentiles.p99"),
    scale=lambda _run, path: 1.0 if path[1].endswith("_ms") else _SECONDS,
    workload={
        "strategy": ("config", "strategy"),
        "requests": ("metrics", "request_totals", "total"),
        "prompt_tokens": ("metrics", "prompt_token_count", "successful", "mean"),
        "output_tokens": ("metrics", "output_token_count", "successful", "mean"),
    },
)

AIPERF: Final = Tool(
    name="AIPerf",
    how="profile_export_aiperf.json",
    is_its=lambda found: _at(found, ("request_throughput", "avg")) is not None,
    run=_whole,
    version=("aiperf_version",),
    completed=("request_count", "avg"),
    failed=("error_request_count", "avg"),
    rates={
        "request_throughput": ("request_throughput", "avg"),
        "output_throughput": ("output_token_throughput", "avg"),
        "total_token_throughput": ("total_token_throughput", "avg"),
    },
    times={
        "ttft": ("time_to_first_token",),
        "tpot": ("inter_token_latency",),
        "e2el": ("request_latency",),
    },
    statistic=_nested(mean="avg"),
    # Its documentation: the unit says how to read a value, the name does not.
    scale=lambda run, path: _UNITS.get(_at(run, (*path, "unit")), math.nan),
    workload={
        "requests": ("request_count", "avg"),
        "input_sequence_length": ("input_sequence_length", "avg"),
        "output_sequence_length": ("output_sequence_length", "avg"),
    },
)

INFERENCE_PERF: Final = Tool(
    name="inference-perf",
    how="summary_lifecycle_metrics.json, or one stage's",
    is_its=lambda found: "load_summary" in found and "successes" in found,
    run=_whole,
    version=(),
    completed=("successes", "count"),
    failed=("failures", "count"),
    rates={
        "request_throughput": ("successes", "throughput", "requests_per_sec"),
        "output_throughput": ("successes", "throughput", "output_tokens_per_sec"),
        "total_token_throughput": ("successes", "throughput", "total_tokens_per_sec"),
    },
    times={
        "ttft": ("successes", "latency", "time_to_first_token"),
        "tpot": ("successes", "latency", "time_per_output_token"),
        "tpot_with_first": ("successes", "latency", "normalized_time_per_output_token"),
        "itl": ("successes", "latency", "inter_token_latency"),
        "e2el": ("successes", "latency", "request_latency"),
    },
    statistic=_nested(p50="median"),
    scale=lambda _run, _path: _SECONDS,
    workload={
        "requests": ("load_summary", "count"),
        "requested_rate": ("load_summary", "requested_rate"),
        "prompt_len": ("successes", "prompt_len", "mean"),
        "output_len": ("successes", "output_len", "mean"),
    },
)

TOOLS: Final = (VLLM, GUIDELLM, AIPERF, INFERENCE_PERF)
