"""Speed, from the result files of ``vllm bench serve --save-result``: one per variant.

Each figure keeps its unit and its definition, since tools differ: vLLM's time per output token
leaves the first token out, and its inter-token latency weighs each gap, not each request.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from moe_serve.errors import UsageError
from moe_serve.files import read_json

TOOL: Final = "vllm bench serve"
_RATES: Final = {
    "request_throughput": ("requests/s", "completed requests over the whole run's duration"),
    "output_throughput": ("tokens/s", "generated tokens over the whole run's duration"),
    "total_token_throughput": (
        "tokens/s",
        "prompt and generated tokens over the whole run's duration",
    ),
}
_TIMES: Final = {
    "ttft": "time to first token: from sending a request to its first token, per request",
    "tpot": "time per output token without the first: (latency - TTFT) / (tokens - 1), per request",
    "itl": "inter-token latency: the gap between two pieces of a stream, each gap counted",
    "e2el": "end-to-end latency: from sending a request to its last token, per request",
}
_STATISTICS: Final = {"mean": "mean", "p50": "median", "p99": "p99"}
"""Ours → the file's."""
_WORKLOAD: Final = (
    "num_prompts",
    "request_rate",
    "burstiness",
    "max_concurrency",
    "total_input_tokens",
    "total_output_tokens",
    "tokenizer_id",
)
"""What must be alike for two runs to be about the models."""


def speed(original: Path, pruned: Path) -> dict[str, Any]:
    """Both variants' figures, and pruned over original of each.

    Raises:
        UsageError: a file is not such a result, or no request of it was completed.
        CheckpointError: a file can't be read.
    """
    sides = {"original": _read(original), "pruned": _read(pruned)}
    figures = {
        name: {
            "unit": unit,
            "definition": definition,
            **_pair({side: _number(f, name) for side, f in sides.items()}),
        }
        for name, (unit, definition) in _RATES.items()
    }
    times: dict[str, dict[str, Any]] = {
        name: {
            "unit": "ms",
            "definition": definition,
            "statistics": {
                ours: _pair({s: _number(f, f"{theirs}_{name}_ms") for s, f in sides.items()})
                for ours, theirs in _STATISTICS.items()
            },
        }
        for name, definition in _TIMES.items()
    }
    return {
        "tool": TOOL,
        "completed": {side: found["completed"] for side, found in sides.items()},
        "failed": {side: found.get("failed", 0) for side, found in sides.items()},
        "throughput": figures,
        "latency": {
            name: found
            for name, found in times.items()
            if any(pair["original"] is not None for pair in found["statistics"].values())
        },
        "unlike": [
            name for name in _WORKLOAD if sides["original"].get(name) != sides["pruned"].get(name)
        ],
    }


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found.get("completed"), int) or "output_throughput" not in found:
        raise UsageError(
            f"is not a result of {TOOL}", where=str(path), remedy=f"{TOOL} --save-result writes one"
        )
    if not found["completed"]:
        raise UsageError("no request was completed", where=str(path), remedy="see its errors")
    return found


def _number(found: dict[str, Any], name: str) -> float | None:
    value = found.get(name)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def _pair(sides: dict[str, float | None]) -> dict[str, float | None]:
    before, after = sides["original"], sides["pruned"]
    ratio = after / before if before and after is not None else None
    return {**sides, "ratio": ratio}
