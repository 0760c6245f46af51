"""``compare`` of two models of which one or both are engines, by URL.

Both get the same token ids and list what they expect at each place. Per token:

- KL(original ‖ pruned): a lower bound from the ``top`` likeliest tokens of each and what is left
  beside them (:mod:`moe_serve.serving.logprobs`);
- perplexity: exact, from the log-probability of the token that stands there;
- top-1 agreement: exact, up to ties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from typing import Final

import numpy as np

from moe_serve.calibration.passages import passages
from moe_serve.calibration.sequences import pack
from moe_serve.calibration.texts import read_texts
from moe_serve.errors import UsageError, require_positive
from moe_serve.evaluation.comparison import Comparison, calibration_of
from moe_serve.evaluation.models import Model
from moe_serve.evaluation.quality import Floats, by_domain
from moe_serve.progress import Progress
from moe_serve.pruning.corpus import Corpus, TextOptions, refuse_overlap, unread
from moe_serve.serving.logprobs import Place, divergence

DEFAULT_TOP: Final = 20
"""The most that vLLM lists unless ``--max-logprobs`` says otherwise."""
DEFAULT_CONCURRENCY: Final = 4


def compare_served(
    before: Model,
    after: Model,
    texts: TextOptions,
    top: int,
    progress: Progress,
    *,
    allow_overlap: bool = False,
    skip_overlap: bool = False,
) -> Comparison:
    """Measure one model against another; the original's tokenizer makes the token ids.

    Args:
        before: what is measured against.
        after: the pruned one.
        texts: what to measure on.
        top: log-probabilities listed per place.
        progress: told about sequences and, of a directory, layers.
        allow_overlap: measure even on texts that the pruned directory was calibrated on.
        skip_overlap: leave out documents that it was calibrated on.

    Raises:
        UsageError: no texts, texts that were calibrated on, or a bound that is not positive.
        CalibrationError: the texts can't be used.
        ServingError: an engine doesn't answer as it should.
    """
    if not texts.paths:
        raise UsageError(
            "give texts to compare on",
            where="--texts",
            remedy="texts that calibration did not use: .jsonl, .txt or a folder of them",
        )
    require_positive({"--tokens": texts.tokens, "--top": top})
    require_positive({"--sequence-length": texts.length}, least=2)
    documents, left_out = read_texts(texts.paths), dict[str, int]()
    calibration = calibration_of(after.name)
    if skip_overlap and calibration:
        documents, left_out = unread(documents, calibration)
    limits = [n for n in (before.length, after.length) if n]
    length = min([texts.length, *limits])
    sequences = pack(documents, before.tokenize, before.end, texts.tokens, length, texts.seed)
    corpus = Corpus(
        sequences=sequences,
        sources=documents.sources,
        passages=tuple(
            tuple(passages(document.text) for document in of_source)
            for _, of_source in documents.by_source()
        ),
    )
    shared = corpus.shared(calibration)
    if not allow_overlap:
        refuse_overlap(shared, f"to calibrate {after.name}")
    rows = [[int(i) for i in ids] for ids in sequences.tokens]
    progress.start("compare", len(rows) + before.steps + after.steps)
    every = []
    with (
        closing(before.expect(rows, top, progress)) as one,
        closing(after.expect(rows, top, progress)) as other,
    ):
        for ids, expected, found in zip(rows, one, other, strict=True):
            every.append(values(ids, expected, found))
            progress.advance()
    return Comparison(
        original=before.name,
        pruned=after.name,
        domains=by_domain(sequences, every),
        expert_bytes={},
        total_bytes={},
        overlap=shared,
        left_out=left_out,
        top=top,
    )


def values(ids: Sequence[int], original: Sequence[Place], pruned: Sequence[Place]) -> Floats:
    """What one sequence's places came to."""
    return np.array(
        [
            (divergence(p, q, math.inf), p.first == q.first, -p.listed[i], -q.listed[i])
            for i, p, q in zip(ids[1:], original, pruned, strict=True)
        ],
        dtype=np.float64,
    ).reshape(-1, 4)
