"""Both engines go on from the same prompts, side by side.

Greedy, so that what differs comes from the models. Not all of it: sums in another order break ties
another way, and from the first other token on the texts go apart. How far they go together says
how alike the models are; the flaws say whether an answer is still one.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np

from moe_serve.calibration.texts import Document, read_texts
from moe_serve.errors import require_positive
from moe_serve.progress import Progress
from moe_serve.serving.client import ServedModel
from moe_serve.serving.garbage import Flaw, flaw

DEFAULT_ANSWER: Final = 64
"""Tokens of each answer, at most."""
_PATIENCE: Final = 300.0
_DETECTED: Final[tuple[Flaw, ...]] = ("empty", "loop", "script", "broken")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One engine's, without its text."""

    tokens: int
    finish_reason: str
    flaw: Flaw
    """Empty, looping, drifted into a script that the prompt has none of, broken; or nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SideBySide:
    """One prompt's answers."""

    prompt: int
    """Its place in the file, from 0."""
    domain: str
    first_divergence: int | None
    """Index of the first token that differs, from 0; ``None``: none does."""
    original: Answer
    pruned: Answer


def side_by_side(
    original: str,
    pruned: str,
    prompts: Path,
    tokens: int,
    concurrency: int,
    progress: Progress,
) -> tuple[SideBySide, ...]:
    """Let both go on from each prompt, in the file's order.

    Raises:
        UsageError: a bound is not positive.
        CalibrationError: the prompts can't be read.
        ServingError: an engine doesn't answer as it should.
    """
    require_positive({"--answer-tokens": tokens, "--concurrency": concurrency})
    documents = read_texts([prompts]).documents
    progress.start("generate", len(documents))
    with httpx.Client(timeout=_PATIENCE) as client, ThreadPoolExecutor(concurrency) as pool:
        before, after = ServedModel.at(original, client), ServedModel.at(pruned, client)

        def answered(number: int, document: Document) -> SideBySide:
            (ids, first), (others, second) = (
                _answer(model, document.text, tokens) for model in (before, after)
            )
            progress.advance()
            return SideBySide(
                prompt=number,
                domain=document.domain,
                first_divergence=first_divergence(ids, others),
                original=first,
                pruned=second,
            )

        tasks = [pool.submit(answered, n, document) for n, document in enumerate(documents)]
        try:
            return tuple(task.result() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()


def _answer(model: ServedModel, prompt: str, tokens: int) -> tuple[tuple[int, ...], Answer]:
    ids, text, reason = model.go_on(prompt, tokens)
    return ids, Answer(tokens=len(ids), finish_reason=reason, flaw=flaw(text, prompt))


def first_divergence(one: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    """Index of the first token that differs; where one ends early, that is its length."""
    pairs = enumerate(zip_longest(one, other))
    return next((index for index, (a, b) in pairs if a != b), None)


def generation_json(found: tuple[SideBySide, ...]) -> dict[str, Any]:
    """Totals, then each prompt; no text."""
    apart = [one.first_divergence for one in found if one.first_divergence is not None]
    sides = {
        "original": [one.original for one in found],
        "pruned": [one.pruned for one in found],
    }
    return {
        "prompts": len(found),
        "identical": len(found) - len(apart),
        "median_first_divergence": float(np.median(apart)) if apart else None,
        "answers": {name: _totals(answers) for name, answers in sides.items()},
        "each": [asdict(one) for one in found],
    }


def _totals(answers: list[Answer]) -> dict[str, Any]:
    flaws = Counter(answer.flaw for answer in answers)
    return {
        "mean_tokens": float(np.mean([answer.tokens for answer in answers])),
        "flaws": {name: flaws[name] for name in _DETECTED},
    }
