"""Everything that ``compare`` measures of two models, each a directory or an engine."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch

from moe_serve.calibration.texts import read_texts
from moe_serve.errors import UsageError, require_positive
from moe_serve.evaluation.bench import paired
from moe_serve.evaluation.comparison import Comparison, compare
from moe_serve.evaluation.generation import DEFAULT_ANSWER, side_by_side
from moe_serve.evaluation.load import Load, as_result, measure_load
from moe_serve.evaluation.memory import held
from moe_serve.evaluation.models import PATIENCE, is_url, opened
from moe_serve.evaluation.served import DEFAULT_CONCURRENCY, DEFAULT_TOP, compare_served
from moe_serve.evaluation.tasks import compare_tasks
from moe_serve.files import write_atomic
from moe_serve.progress import Progress
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.device import CPU
from moe_serve.pruning.request import DEFAULT_BATCH
from moe_serve.serving.client import ServedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What to measure, of what, on what."""

    original: str
    """A directory or an engine's URL."""
    pruned: str
    texts: TextOptions
    allow_overlap: bool = False
    skip_overlap: bool = False
    """Leave out documents that the pruned directory was calibrated on."""
    device: torch.device = CPU
    """Where a directory is computed."""
    batch_tokens: int = DEFAULT_BATCH
    top: int = DEFAULT_TOP
    """Where one is an engine: log-probabilities per token."""
    concurrency: int = DEFAULT_CONCURRENCY
    """Requests at once to an engine."""
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    prompts: Path | None = None
    """For both to go on from; two engines only."""
    answer_tokens: int = DEFAULT_ANSWER
    load: Load | None = None
    """Measure memory, and of two engines speed."""
    results: tuple[Path, Path] | None = None
    """Where to write both engines' speed, in the shape of ``vllm bench serve``."""

    def check(self) -> None:
        """Before anything is measured: a wrong option must not cost an hour.

        Raises:
            UsageError: one is out of range, or asks of a directory what only an engine can do.
        """
        load = self.load or Load()
        require_positive(
            {
                "--concurrency": min(self.concurrency, load.concurrency),
                "--answer-tokens": min(self.answer_tokens, load.answer_tokens),
                "--task-limit": self.task_limit,
                "--speed-requests": load.requests,
                "prompt tokens": load.prompt_tokens,
            }
        )
        if self.allow_overlap and self.skip_overlap:
            raise UsageError(
                "contradict each other",
                where="--allow-overlap, --skip-overlap",
                remedy="give one",
            )
        for option, wanted in (("--prompts", self.prompts), ("--save-bench", self.results)):
            if wanted is not None and not self.engines:
                raise UsageError(
                    "needs two engines", where=option, remedy="give their URLs, not directories"
                )
        if self.results is not None and self.load is None:
            raise UsageError("has nothing to save", where="--save-bench", remedy="give --speed")

    @property
    def engines(self) -> bool:
        """Whether both are."""
        return is_url(self.original) and is_url(self.pruned)

    @property
    def stored(self) -> bool:
        """Whether both are directories."""
        return not is_url(self.original) and not is_url(self.pruned)


def measure(wanted: Wanted, progress: Progress) -> Comparison:
    """All that is wanted, in one result.

    Raises:
        UsageError: see :meth:`Wanted.check`; or the texts or tasks overlap with the calibration.
        MoeServeError: a model, the texts or a task can't be used.
    """
    wanted.check()
    found = _quality(wanted, progress)
    if wanted.prompts is not None:
        answers = side_by_side(
            wanted.original,
            wanted.pruned,
            wanted.prompts,
            wanted.answer_tokens,
            wanted.concurrency,
            progress,
        )
        found = replace(found, generation=answers)
    if wanted.load is not None:
        found = replace(found, held=held(wanted.original, wanted.pruned))
        if wanted.engines:
            found = replace(found, speed=_speed(wanted, wanted.load, progress))
    return found


def _speed(wanted: Wanted, load: Load, progress: Progress) -> dict[str, Any]:
    """Of two engines; prompts are cut from the texts."""
    limits = httpx.Limits(max_connections=2 * load.concurrency)
    with httpx.Client(timeout=PATIENCE, limits=limits) as client:
        before, after = (ServedModel.at(url, client) for url in (wanted.original, wanted.pruned))
        documents = read_texts(wanted.texts.paths).documents
        stream: list[int] = []
        for document in documents:
            stream += before.tokenize(document.text)
            if len(stream) > (load.requests + load.concurrency) * (load.prompt_tokens + 1):
                break
        contents = measure_load((before, after), stream, load, progress)
    for path, content in zip(wanted.results or (), contents, strict=False):
        write_atomic(path, json.dumps(content, indent=2).encode())
    return paired(*map(as_result, contents))


def _quality(wanted: Wanted, progress: Progress) -> Comparison:
    """On texts, and on tasks where there are any."""
    if wanted.stored and not wanted.tasks:
        return _directories(wanted, progress)
    sides = (wanted.device, wanted.batch_tokens, wanted.concurrency)
    with opened(wanted.original, *sides) as before, opened(wanted.pruned, *sides) as after:
        overlap = wanted.allow_overlap
        if wanted.stored:
            found = _directories(wanted, progress)
        else:
            found = compare_served(
                before,
                after,
                wanted.texts,
                wanted.top,
                progress,
                allow_overlap=overlap,
                skip_overlap=wanted.skip_overlap,
            )
        if wanted.tasks:
            tasks = compare_tasks(
                before, after, wanted.tasks, wanted.task_limit, progress, allow_overlap=overlap
            )
            found = replace(found, tasks=tasks)
        return found


def _directories(wanted: Wanted, progress: Progress) -> Comparison:
    return compare(
        Path(wanted.original),
        Path(wanted.pruned),
        wanted.texts,
        wanted.device,
        wanted.batch_tokens,
        progress,
        allow_overlap=wanted.allow_overlap,
        skip_overlap=wanted.skip_overlap,
    )
