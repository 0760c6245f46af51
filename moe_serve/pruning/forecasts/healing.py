"""What healing takes: drafts by the original, then training of every layer on them.

The letters are those of ``formulas.py``.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Final

from moe_serve.pruning.fitting.drafts import LOGIT_TOKENS
from moe_serve.pruning.fitting.goals import LOGITS
from moe_serve.pruning.fitting.heal import STEPS
from moe_serve.pruning.forecasts.forecast import Step
from moe_serve.pruning.forecasts.formulas import F32, F64, dense, fit, layer_memory, routed
from moe_serve.pruning.forecasts.steps import apply_step
from moe_serve.pruning.forecasts.work import Sizes, Work
from moe_serve.pruning.plan import Heal, Refit

_ORTHOGONAL: Final = 5
"""Newton-Schulz iterations of a step of Muon."""


def drafts_step(sizes: Sizes, work: Work, by: Heal) -> Step:
    """Forward once a round over the texts that are not held out; the logits of what is drawn."""
    shape, texts = sizes.shape, _trained(work)
    drawn = by.rounds * by.drafts * by.redrawn * texts
    head = shape.vocabulary * shape.hidden * F32
    return Step(
        name="draft",
        passes=by.rounds,
        flops=by.rounds * texts * (dense(sizes, work) + routed(sizes))
        + drawn * 2 * shape.vocabulary * shape.hidden,
        read=by.rounds * (sizes.decoder_bytes + sizes.embedding_bytes + sizes.head_bytes),
        written=0,
        memory=max(
            layer_memory(sizes, work), head + LOGIT_TOKENS * shape.vocabulary * (F32 + 3 * F64)
        ),
        disk=2 * texts * shape.hidden * F32,
    )


def healed_step(sizes: Sizes, work: Work, by: Heal) -> Step:
    """Apply on texts and drafts; each layer is fitted once more before, and trained.

    Training costs three forward passes through what is kept of the experts; a step of Muon, for
    each of their matrices, five times 4 r² c + 2 r³, r and c its shorter and its longer side. The
    last layer's loss takes five products with the output matrix.
    """
    shape, texts = sizes.shape, _trained(work)
    more = replace(work, tokens=work.tokens + by.rounds * by.drafts * texts)
    trained = texts * (1 + by.rounds * by.drafts)
    held = (by.epochs + 1) * (work.tokens - texts)
    steps = by.epochs * ceil(trained / max(min(by.batch, trained // STEPS), 1))
    r, c = sorted((max(int(work.keep * shape.width), 1), shape.hidden))
    muon = 3 * shape.experts * _ORTHOGONAL * (4 * r**2 * c + 2 * r**3)
    kept, weights = work.keep * routed(sizes), int(work.keep * sizes.layer_weights) * F32
    head = shape.vocabulary * shape.hidden
    # Without a re-fit two streams pass the layers all the same.
    applied = apply_step(sizes, replace(more, refit=work.refit or Refit(ridges=())))
    logits = min(LOGITS, by.batch * shape.vocabulary)
    return replace(
        applied,
        flops=applied.flops
        + (by.epochs * 3 * trained + held) * kept
        + (by.epochs * 5 * trained + 2 * held) * 2 * head
        + steps * sizes.sparse * muon
        + (sizes.sparse * fit(sizes, more, work.refit) if work.refit else 0.0),
        read=applied.read + sizes.head_bytes,
        memory=max(
            applied.memory,
            layer_memory(sizes, more) + 6 * weights + (head + 5 * logits) * F32,
        ),
    )


def _trained(work: Work) -> int:
    """Tokens of the texts that are not held out."""
    return round((1 - (work.refit or Refit()).holdout) * work.tokens)
