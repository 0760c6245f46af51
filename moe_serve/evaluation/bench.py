"""Speed, from two result files of one load generator, or from two runs of our own.

Each figure keeps its unit and its definition, since tools differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_serve.errors import UsageError
from moe_serve.evaluation.results import DEFINITIONS, STATISTICS, TOOLS, Result
from moe_serve.files import read_json


def speed(original: Path, pruned: Path) -> dict[str, Any]:
    """Both variants' figures, and pruned over original of each.

    Raises:
        UsageError: a file is no such result, no request of it was completed, or the two are of
            different tools.
        CheckpointError: a file can't be read.
    """
    before, after = read(original), read(pruned)
    if before.tool != after.tool:
        raise UsageError(
            f"one is of {before.tool}, the other of {after.tool}: they measure different things",
            where=f"{original}, {pruned}",
            remedy="measure both with one tool",
        )
    return paired(before, after)


def read(path: Path) -> Result:
    """One run, whichever tool wrote it.

    Raises:
        UsageError: no known tool did, there is not exactly one run, or none of its requests was
            completed.
        CheckpointError: it can't be read.
    """
    content = read_json(path)
    tool = next((tool for tool in TOOLS if tool.is_its(content)), None)
    if tool is None:
        known = "; ".join(f"{tool.name}: {tool.how}" for tool in TOOLS)
        raise UsageError("is not a result that is known here", where=str(path), remedy=known)
    found = tool.read(content)
    if found is None:
        raise UsageError(
            "holds not exactly one run", where=str(path), remedy=f"{tool.name}: {tool.how}"
        )
    if not found.completed:
        raise UsageError(
            "no request was completed",
            where=str(path),
            remedy="measure again where the server answers; the tool's output says why it did not",
        )
    return found


def paired(before: Result, after: Result) -> dict[str, Any]:
    """As in ``compare --json``."""
    sides = {"original": before, "pruned": after}
    throughput = {
        name: {
            "unit": "requests/s" if name == "request_throughput" else "tokens/s",
            "definition": DEFINITIONS[name],
            "field": before.fields[name],
            **_pair({side: found.rates[name] for side, found in sides.items()}),
        }
        for name in before.rates
    }
    latency: dict[str, dict[str, Any]] = {
        name: {
            "unit": "ms",
            "definition": DEFINITIONS[name],
            "field": before.fields[name],
            "statistics": {
                statistic: _pair({s: found.times[name][statistic] for s, found in sides.items()})
                for statistic in STATISTICS
            },
        }
        for name in before.times
    }
    return {
        "tool": before.tool,
        "versions": {side: found.version for side, found in sides.items()},
        "completed": {side: found.completed for side, found in sides.items()},
        "failed": {side: found.failed for side, found in sides.items()},
        "throughput": {n: row for n, row in throughput.items() if row["original"] is not None},
        "latency": {n: row for n, row in latency.items() if _known(row)},
        "unlike": [
            name for name, value in before.workload.items() if value != after.workload[name]
        ],
    }


def _known(row: Mapping[str, Any]) -> bool:
    return any(pair["original"] is not None for pair in row["statistics"].values())


def _pair(sides: dict[str, float | None]) -> dict[str, float | None]:
    before, after = sides["original"], sides["pruned"]
    ratio = after / before if before and after is not None else None
    return {**sides, "ratio": ratio}
