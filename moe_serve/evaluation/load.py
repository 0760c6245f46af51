"""Speed of two engines, measured in one run: streamed completions, each engine in turn.

Rounds alternate, so that whatever else the machines do meets both alike, and neither engine works
while the other is measured. Both get the same token ids, and as many tokens of answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final

import httpx
import numpy as np

from moe_serve.errors import ServingError
from moe_serve.evaluation.models import PATIENCE
from moe_serve.evaluation.results import VLLM, Result
from moe_serve.progress import Progress
from moe_serve.serving.client import ServedModel

TOOL: Final = "moe-serve compare --speed"
_PERCENTILES: Final = {"median": 50, "p99": 99}


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What is asked of each engine."""

    requests: int = 32
    """Counted ones; a round before them warms up."""
    prompt_tokens: int = 128
    answer_tokens: int = 64
    concurrency: int = 4
    """Requests of a round: all at once, the next when the last of them has its answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """One streamed answer; seconds from sending it."""

    pieces: tuple[float, ...]
    end: float
    tokens: int


@dataclass(kw_only=True, slots=True)
class _Measured:
    seconds: float = 0.0
    answers: list[Timed] = field(default_factory=list)
    failed: int = 0


def measure_load(
    engines: tuple[ServedModel, ServedModel], stream: Sequence[int], load: Load, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both engines' results, in the shape that ``vllm bench serve`` writes.

    Args:
        engines: original and pruned.
        stream: token ids that prompts are cut from; the same ones for both.
        load: what to ask.
        progress: told about rounds.

    Raises:
        ServingError: an engine completed no request.
    """
    found = (_Measured(), _Measured())
    rounds = -(-load.requests // load.concurrency)
    progress.start("speed", 1 + rounds)
    with ThreadPoolExecutor(load.concurrency) as pool:
        for number in range(-1, rounds):
            first = max(number, 0) * load.concurrency
            count = min(load.concurrency, load.requests - first)
            # Warming up takes other prompts: an engine may keep what it has computed.
            start = first if number >= 0 else load.requests
            prompts = [_prompt(stream, start + n, load.prompt_tokens) for n in range(count)]
            # Who goes first changes, so that coming second costs both alike.
            for side in (0, 1) if number % 2 else (1, 0):
                kept = found[side] if number >= 0 else _Measured()
                _round(engines[side], prompts, load, kept, pool.map)
            progress.advance()
    for engine, measured in zip(engines, found, strict=True):
        if not measured.answers:
            raise ServingError(
                "completed none of the requests that speed is measured with",
                where=engine.url,
                remedy="the engine's log says why",
            )
    return _result(engines[0], found[0], load), _result(engines[1], found[1], load)


def _prompt(stream: Sequence[int], number: int, length: int) -> list[int]:
    """Another beginning for each, also where the stream is too short for all."""
    start = number * length + number + 1
    return [stream[(start + n) % len(stream)] for n in range(length)]


def _round(
    engine: ServedModel,
    prompts: list[list[int]],
    load: Load,
    into: _Measured,
    together: Callable[..., Any],
) -> None:
    begun = time.perf_counter()
    for answer in together(lambda ids: _ask(engine, ids, load.answer_tokens), prompts):
        if answer is None:
            into.failed += 1
        else:
            into.answers.append(answer)
    into.seconds += time.perf_counter() - begun


def _ask(engine: ServedModel, ids: list[int], tokens: int) -> Timed | None:
    """One answer; ``None`` where it failed."""
    body = {
        "model": engine.model,
        "prompt": ids,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "seed": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    pieces: list[float] = []
    count = 0
    begun = time.perf_counter()
    try:
        with engine.client.stream(
            "POST", f"{engine.url}/v1/completions", json=body, timeout=PATIENCE
        ) as answer:
            if answer.status_code != httpx.codes.OK:
                return None
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if event.get("choices"):
                    pieces.append(time.perf_counter() - begun)
                if usage := event.get("usage"):
                    count = int(usage["completion_tokens"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    if not pieces:
        return None
    return Timed(pieces=tuple(pieces), end=pieces[-1], tokens=count or len(pieces))


def _result(engine: ServedModel, found: _Measured, load: Load) -> dict[str, Any]:
    answers = found.answers
    produced = sum(answer.tokens for answer in answers)
    read = len(answers) * load.prompt_tokens
    times = {
        "ttft": [answer.pieces[0] for answer in answers],
        "tpot": [
            (answer.end - answer.pieces[0]) / (answer.tokens - 1)
            for answer in answers
            if answer.tokens > 1
        ],
        "itl": [float(gap) for answer in answers for gap in np.diff(answer.pieces)],
        "e2el": [answer.end for answer in answers],
    }
    figures: dict[str, float] = {}
    for name, values in times.items():
        if not values:
            continue
        milliseconds = 1000.0 * np.array(values)
        figures[f"mean_{name}_ms"] = float(milliseconds.mean())
        figures[f"std_{name}_ms"] = float(milliseconds.std())
        for statistic, percentile in _PERCENTILES.items():
            figures[f"{statistic}_{name}_ms"] = float(np.percentile(milliseconds, percentile))
    return {
        "backend": TOOL,
        "model_id": engine.model,
        "num_prompts": load.requests,
        "max_concurrency": load.concurrency,
        "duration": found.seconds,
        "completed": len(answers),
        "failed": found.failed,
        "total_input_tokens": read,
        "total_output_tokens": produced,
        "request_throughput": len(answers) / found.seconds,
        "output_throughput": produced / found.seconds,
        "total_token_throughput": (read + produced) / found.seconds,
        **figures,
    }


def as_result(content: dict[str, Any]) -> Result:
    """What was measured here, as a result like those read from files."""
    return replace(VLLM.result(content), tool=TOOL)
