"""``compare --tasks``: lm-eval's tasks on both models, item by item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moe_serve.calibration.passages import Known, passages
from moe_serve.errors import UsageError, require_positive
from moe_serve.evaluation.comparison import calibration_of
from moe_serve.evaluation.models import Model
from moe_serve.evaluation.paired import mean_of, paired
from moe_serve.progress import Progress
from moe_serve.pruning.corpus import refuse_overlap


def compare_tasks(
    before: Model,
    after: Model,
    specs: Sequence[str],
    limit: int | None,
    progress: Progress,
    *,
    allow_overlap: bool = False,
) -> dict[str, Any]:
    """Both models' values on the same items, and what differs.

    Args:
        before: what is measured against.
        after: the pruned one.
        specs: directories of task files, task files, or names that lm-eval knows.
        limit: items of each task, at most; ``None``: all.
        progress: told about requests.
        allow_overlap: measure even with items from texts that ``after`` was calibrated on.

    Raises:
        UsageError: lm-eval is not installed, or a task can't be used.
        ServingError: an engine doesn't answer as it should.
    """
    require_positive({"--task-limit": limit})
    harness = _harness()
    rows: list[dict[str, Any]] = []
    by_metric: dict[str, list[Any]] = {}
    better: dict[str, bool] = {}
    overlap: list[str] = []
    for spec in specs:
        # Loaded anew for each model: a task holds the requests and answers of one run.
        tasks, again = harness.load(spec), harness.load(spec)
        overlap += _overlap(harness.strings_of(tasks), after.name)
        if not allow_overlap:
            refuse_overlap(overlap, f"to calibrate {after.name}")
        one = harness.measure(before, tasks, limit, progress)
        other = harness.measure(after, again, limit, progress)
        for (task, metric), values in one.values.items():
            same = one.answers[task] == other.answers[task]
            both = [
                pair
                for pair in zip(values, other.values[task, metric], strict=True)
                if all(map(math.isfinite, pair))
            ]
            if not both:
                continue
            found = paired(
                *zip(*both, strict=True), identical=same, left_out=len(values) - len(both)
            )
            higher = one.higher_is_better[task, metric]
            figures = found.to_json(higher_is_better=higher)
            rows.append({"task": task, "metric": metric, **figures})
            by_metric.setdefault(metric, []).append(found)
            better[metric] = higher
    return {
        "tool": f"lm-eval {harness.VERSION}",
        "sources": list(specs),
        "tasks": rows,
        "mean": {
            metric: mean_of(found).to_json(higher_is_better=better[metric])
            for metric, found in by_metric.items()
            if len(found) > 1
        },
        "overlap": overlap,
    }


def _harness() -> Any:
    try:
        from moe_serve.evaluation import harness
    except ImportError as exc:
        raise UsageError(
            f"needs lm-eval ({exc.name} is missing)",
            where="--tasks",
            remedy="pip install 'moe-serve[evaluation]'",
        ) from exc
    return harness


def _overlap(strings: dict[str, list[str]], name: str) -> list[str]:
    """Tasks whose items' texts ``name`` was calibrated on."""
    record = calibration_of(name)
    records = [record, record.get("statistics", {})]
    return known_of(strings, [Known.from_json(r["passages"]) for r in records if "passages" in r])


def known_of(strings: dict[str, list[str]], known: Sequence[Known]) -> list[str]:
    """Tasks whose items' texts are known from one of some records.

    An item is short, so that all of a task's are judged together, by passages that a longer
    document they may be from would have given too.
    """
    found = []
    for task, texts in strings.items():
        every = sorted({h for text in texts for h in passages(text, least=0)}) if known else []
        if any(k.overlaps(every) for k in known):
            found.append(task)
    return found
