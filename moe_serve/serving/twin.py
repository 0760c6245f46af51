"""A compact checkpoint and its full-size twin, put to the same questions in vLLM."""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from moe_serve.checkpoint.export import export
from moe_serve.checkpoint.form import ROUTER_MASK
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import ServingError
from moe_serve.progress import Progress
from moe_serve.serving.engine import EngineSpec, has_gpu, is_ready, require_servable
from moe_serve.serving.ports import free_port
from moe_serve.serving.reference import forced_logprobs

BOUND: Final = 1e-4
"""Largest difference of a log-probability, in nats, that rounding in FP32 explains."""
_LENGTHS: Final = (96, 33, 5)
_GENERATED: Final = 8
_READY_SECONDS: Final = 1800.0
_STOP_GRACE: Final = 15.0

Row = list[tuple[int, float]]
"""Token ids and their log-probabilities."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far two engines are apart."""

    tokens: int
    """How many log-probabilities were compared."""
    difference: float
    """The largest difference, in nats."""


def compare_with_twin(folder: Path, progress: Progress) -> Agreement:
    """Serve ``folder`` and then its tied form, both in FP32, and compare their answers.

    The tied form is written to a temporary directory (``TMPDIR``), of the original's size. Where
    layers drop different numbers of experts, stock vLLM can't serve it: then its log-probabilities
    of the compact engine's tokens are computed here, with the mask that says what is dropped.

    Args:
        folder: a compact checkpoint.
        progress: told about the engines.

    Raises:
        UsageError: it is not compact.
        ServingError: vLLM does not serve it rightly here; an engine did not start or answer.
    """
    checkpoint = open_checkpoint(folder)
    require_servable(folder, gpu=has_gpu())
    prompts = _prompts(checkpoint.shape.vocabulary)
    with tempfile.TemporaryDirectory(prefix="moe-serve-") as temporary:
        twin = export(folder, Path(temporary) / "tied", "tied", progress)
        progress.start("ask engines", 2)
        ours = _ask("compact", folder, prompts)
        progress.advance()
        if (twin / ROUTER_MASK).exists():
            theirs = _forced(twin, prompts, ours)
        else:
            theirs = _ask("tied", twin, prompts)
        progress.advance()
    return difference(ours, theirs)


def difference(ours: Sequence[Row], theirs: Sequence[Row]) -> Agreement:
    """Compare rows as far as their tokens agree: after another token nothing is comparable."""
    apart = []
    for left, right in zip(ours, theirs, strict=True):
        for (a, x), (b, y) in zip(left, right, strict=True):
            apart.append(abs(x - y))
            if a != b:
                break
    # max() passes over NaN.
    worst = max((math.inf if math.isnan(d) else d for d in apart), default=math.inf)
    return Agreement(tokens=len(apart), difference=worst)


def _prompts(vocabulary: int) -> list[list[int]]:
    """The same ids every time; what they say does not matter."""
    rng = random.Random(0)
    return [[rng.randrange(vocabulary) for _ in range(length)] for length in _LENGTHS]


def _forced(twin: Path, prompts: list[list[int]], rows: list[Row]) -> list[Row]:
    """The same tokens as in ``rows``, with the log-probabilities that the tied form gives them."""
    texts = [[p[0], *(token for token, _ in row)] for p, row in zip(prompts, rows, strict=True)]
    found = forced_logprobs(twin, texts)
    return [list(zip(t[1:], values, strict=True)) for t, values in zip(texts, found, strict=True)]


def _ask(name: str, model: Path, prompts: list[list[int]]) -> list[Row]:
    """Start an engine, put all prompts to it, stop it; its log stays where that failed."""
    handle, log = tempfile.mkstemp(prefix=f"moe-serve-{name}-", suffix=".log")
    os.close(handle)
    spec = EngineSpec(
        variant=name,
        model=model,
        served_model="model",
        port=free_port(),
        log=Path(log),
        arguments=(
            *("--dtype", "float32"),
            *("--max-model-len", str(max(_LENGTHS) + _GENERATED)),
            *("--max-num-seqs", "4"),
        ),
    )
    child = spec.launch(gpu=has_gpu(), yielding=False)
    try:
        until = time.monotonic() + _READY_SECONDS
        while not is_ready(spec, child):
            if time.monotonic() > until:
                raise ServingError(
                    f"not ready after {_READY_SECONDS:g} s; its log ends:\n{child.tail()}\n",
                    where=child.name,
                    remedy=f"the whole log is {log}",
                )
            time.sleep(0.5)
        rows = [_row(spec.url, prompt) for prompt in prompts]
    finally:
        child.stop(_STOP_GRACE)
    spec.log.unlink()
    return rows


def _row(url: str, prompt: list[int]) -> Row:
    """Log-probabilities of a prompt's tokens but the first, and of those generated after it."""
    body = {
        "model": "model",
        "prompt": prompt,
        "max_tokens": _GENERATED,
        "temperature": 0.0,
        "ignore_eos": True,
        "logprobs": 0,
        "prompt_logprobs": 0,
        "return_token_ids": True,
    }
    try:
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=300.0, trust_env=False)
        reply.raise_for_status()
        choice: dict[str, Any] = reply.json()["choices"][0]
        known = choice["prompt_logprobs"][1:]
        row = [(t, float(e[str(t)]["logprob"])) for t, e in zip(prompt[1:], known, strict=True)]
        made = zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
        return row + [(int(token), float(value)) for token, value in made]
    except (httpx.HTTPError, KeyError, TypeError, ValueError) as exc:
        raise ServingError(
            f"did not answer a prompt of {len(prompt)} tokens ({exc})",
            where=url,
            remedy="try the request by hand; its engine's log may say more",
        ) from exc
