"""``compare`` of two engines by URL.

Both get the same token ids and list what they expect at each place. Per token:

- KL(original ‖ pruned): a lower bound from the ``top`` likeliest tokens of each and what is left
  beside them (:mod:`moe_serve.serving.logprobs`);
- perplexity: exact, from the log-probability of the token that stands there;
- top-1 agreement: exact, up to ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import httpx

from moe_serve.calibration.sequences import pack
from moe_serve.calibration.texts import read_texts
from moe_serve.errors import UsageError
from moe_serve.evaluation.comparison import Comparison
from moe_serve.evaluation.divergence import Sums, by_domain
from moe_serve.progress import Progress
from moe_serve.pruning.corpus import TextOptions
from moe_serve.serving.client import ServedModel
from moe_serve.serving.logprobs import Place, divergence

DEFAULT_TOP: Final = 20
"""The most that vLLM lists unless ``--max-logprobs`` says otherwise."""
DEFAULT_CONCURRENCY: Final = 4
PATIENCE: Final = 300.0
"""Seconds for one answer."""


def compare_served(
    original: str,
    pruned: str,
    texts: TextOptions,
    top: int,
    concurrency: int,
    progress: Progress,
) -> Comparison:
    """Measure one engine against another; the original's tokenizer makes the token ids.

    Args:
        original: URL of the engine that is measured against.
        pruned: URL of the other.
        texts: what to measure on.
        top: log-probabilities listed per place.
        concurrency: requests at once to each engine.
        progress: told about sequences.

    Raises:
        UsageError: no texts, or a bound that is not positive.
        CalibrationError: the texts can't be used.
        ServingError: an engine doesn't answer as it should.
    """
    if not texts.paths:
        raise UsageError("give texts to compare on", where="--texts")
    if min(texts.tokens, texts.length - 1, top, concurrency) < 1:
        raise UsageError(
            "must be positive",
            where="--tokens, --sequence-length (from 2), --top, --concurrency",
        )
    documents = read_texts(texts.paths)
    with (
        httpx.Client(timeout=PATIENCE, limits=httpx.Limits(max_connections=2 * concurrency)) as c,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        before, after = ServedModel.at(original, c), ServedModel.at(pruned, c)
        # One token is generated: the engine refuses a prompt that fills its context.
        limits = [n - 1 for n in (before.length, after.length) if n]
        length = min([texts.length, *limits])
        sequences = pack(documents, before.tokenize, None, texts.tokens, length, texts.seed)
        progress.start("compare", len(sequences.tokens))

        def measured(ids: Sequence[int]) -> Sums:
            found = sums(ids, before.expect(ids, top), after.expect(ids, top))
            progress.advance()
            return found

        tasks = [pool.submit(measured, [int(i) for i in ids]) for ids in sequences.tokens]
        try:
            every = [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
    return Comparison(
        original=original,
        pruned=pruned,
        domains=by_domain(sequences, every),
        expert_bytes={},
        total_bytes={},
        top=top,
    )


def sums(ids: Sequence[int], original: Sequence[Place], pruned: Sequence[Place]) -> Sums:
    """One sequence's totals over its places."""
    pairs = list(zip(original, pruned, strict=True))
    return Sums(
        tokens=len(pairs),
        kl=math.fsum(divergence(p, q, math.inf) for p, q in pairs),
        agree=sum(p.first == q.first for p, q in pairs),
        loss_original=-math.fsum(p.listed[i] for i, p in zip(ids[1:], original, strict=True)),
        loss_pruned=-math.fsum(q.listed[i] for i, q in zip(ids[1:], pruned, strict=True)),
    )
