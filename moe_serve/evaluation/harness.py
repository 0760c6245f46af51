"""lm-eval (extra ``evaluation``) over models of ours: its tasks and metrics, our log-probabilities.

Imported only where tasks are asked for: lm-eval is optional, and slow to import.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import datasets
from datasets.exceptions import DatasetsError
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from yaml import YAMLError

from moe_serve.errors import UsageError
from moe_serve.evaluation.forks import forked
from moe_serve.evaluation.models import Model
from moe_serve.progress import Progress

VERSION: Final = version("lm-eval")
_ROOM: Final = 2048
"""Tokens of context where the model doesn't say."""
_LOG: Final = "perplexity"
"""What lm-eval calls the log-likelihood of one item, since it makes a perplexity of their mean."""
LOG_LIKELIHOOD: Final = "log_likelihood_nats"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a model's items came to."""

    values: Mapping[tuple[str, str], tuple[float, ...]]
    """Task and metric → one value per item."""
    answers: Mapping[str, Any]
    """Task → what the model gave for each item: equal only where models are."""
    higher_is_better: Mapping[tuple[str, str], bool]


class Asked(TemplateLM):
    """A model as lm-eval asks it."""

    def __init__(self, model: Model, progress: Progress) -> None:
        """Token ids without special tokens, as everywhere here."""
        super().__init__()
        self._model, self._progress = model, progress

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that has no context."""
        if self._model.end is None:
            raise UsageError(
                "has items without a context, and an engine doesn't name its end-of-text token",
                where="--tasks",
                remedy="measure the directory",
            )
        return self._model.end

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_other: object
    ) -> list[int]:
        """Token ids of a text."""
        del add_special_tokens
        return self._model.tokenize(string)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context; lm-eval's bars would run into ours."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_other: object
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context, whose beginning goes where it is too long."""
        room = self._model.length or _ROOM
        pairs = []
        for _, context, continuation in requests:
            row = tuple([*context, *continuation][-room:])
            # A slice of [-0:] would be all of them.
            first = len(row) - min(len(continuation), room - 1)
            pairs.append((row[:first], row[first:]))
        forks = forked(pairs)
        self._progress.start("tasks", len(pairs) + self._model.steps)
        found = [(0.0, True)] * len(pairs)
        with closing(self._model.follow(tuple(forks), 1, self._progress)) as every:
            for numbers, continuations in zip(forks.values(), every, strict=True):
                for number, places in zip(numbers, continuations, strict=True):
                    told = list(zip(pairs[number][1], places, strict=True))
                    found[number] = (
                        math.fsum(place.listed[token] for token, place in told),
                        all(place.first == token for token, place in told),
                    )
                    self._progress.advance()
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, each token once, in windows as long as the context."""
        del disable_tqdm
        asked: list[tuple[tuple[str, str], list[int], list[int]]] = []
        owners = []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=(self._model.length or _ROOM) - 1,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, windows):
                asked.append((("", ""), *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(asked), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy: what differs comes from the models."""
        del disable_tqdm
        self._progress.start("tasks", len(requests))
        found = []
        for request in requests:
            prompt, settings = request.args
            until = settings.get("until") or ()
            stops = [until] if isinstance(until, str) else list(until)
            tokens = int(settings.get("max_gen_toks", 256))
            found.append(self._model.go_on(prompt, tokens, stops))
            self._progress.advance()
        return found


def load(spec: str) -> Any:
    """lm-eval's tasks: a directory of task files, one task file, or names of its own.

    Paths of data in a task file are relative to its directory.

    Raises:
        UsageError: there is no such task, or its data can't be had.
    """
    path = Path(spec)
    local = path.exists()
    if not local and (path.suffix or len(path.parts) > 1):
        raise UsageError(
            "is not there", where=spec, remedy="correct the path, or give a name that lm-eval knows"
        )
    folder = path if path.is_dir() else path.parent
    with _reading(spec), _data_in(folder) if local else contextlib.nullcontext():
        if not local:
            return TaskManager().load(spec.split(","))
        manager = TaskManager(include_path=".", include_defaults=False)
        names = manager.all_subtasks if folder == path else [path.name]
        if not names:
            raise UsageError(
                "holds no task file", where=spec, remedy="put a YAML of lm-eval's into it"
            )
        return manager.load(names)


@contextlib.contextmanager
def _reading(spec: str) -> Iterator[None]:
    """lm-eval's complaints as ours.

    Raises:
        UsageError: instead of whatever it raises.
    """
    try:
        yield
    except (KeyError, ValueError, TypeError, OSError, YAMLError, DatasetsError) as exc:
        raise UsageError(
            f"can't be loaded ({type(exc).__name__}: {' '.join(str(exc).split())[:200]})",
            where=spec,
            remedy="give a directory of task files, a file, or a name that lm-eval knows; "
            "its own tasks fetch their data from the network",
        ) from exc


@contextlib.contextmanager
def _data_in(folder: Path) -> Iterator[None]:
    """Read data beside the task files, and leave no copy of it in the user's cache."""
    kept = datasets.config.HF_DATASETS_CACHE
    with TemporaryDirectory(prefix="moe-serve-tasks-") as cache, contextlib.chdir(folder):
        datasets.config.HF_DATASETS_CACHE = Path(cache)
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = kept


def strings_of(tasks: Any) -> dict[str, list[str]]:
    """Task → all texts of its items."""
    return {
        name: [text for item in task.eval_docs for text in _strings(item)]
        for name, task in tasks["tasks"].items()
    }


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def measure(model: Model, tasks: Any, limit: int | None, progress: Progress) -> Measured:
    """Ask a model all items, or the first ``limit`` of each task."""
    found = evaluate(Asked(model, progress), tasks, limit=limit, bootstrap_iters=0)
    values: dict[tuple[str, str], list[float]] = {}
    answers: dict[str, list[Any]] = {}
    better: dict[tuple[str, str], bool | None] = {}
    for task, samples in found["samples"].items():
        for sample in sorted(samples, key=lambda s: (s["filter"], s["doc_id"])):
            answers.setdefault(task, []).append(sample["resps"])
            for metric in sample["metrics"]:
                # Others (pairs of sums, for a corpus) are no value of one item.
                if isinstance(sample[metric], int | float):
                    key = (task, _named(metric, sample["filter"]))
                    values.setdefault(key, []).append(float(sample[metric]))
                    better[key] = metric == _LOG or found["higher_is_better"][task][metric]
    return Measured(
        values={key: tuple(row) for key, row in values.items()},
        answers=answers,
        # Where a task doesn't say, as lm-eval has it for accuracies.
        higher_is_better={key: value is not False for key, value in better.items()},
    )


def _named(metric: str, how: str) -> str:
    """A metric's name, with the filter where there are several."""
    name = LOG_LIKELIHOOD if metric == _LOG else metric
    return name if how == "none" else f"{name},{how}"
