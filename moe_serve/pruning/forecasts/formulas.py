"""What steps have in common, in sizes of the model.

T tokens; N experts of I neurons, k chosen per token, D hidden size, V vocabulary, L tokens per
sequence, S the side of a re-fit's normal matrix. A multiplication with its addition counts two, in
FP64 four: rates are those of FP32, and processors and data-centre cards take twice as long for it.
"""

from __future__ import annotations

from typing import Final

from moe_serve.calibration.trace import KEPT_BYTES as STATES_BYTES
from moe_serve.pruning.fitting.refit import CHUNK
from moe_serve.pruning.fitting.routed import KEPT_BYTES
from moe_serve.pruning.forecasts.work import Sizes, Work
from moe_serve.pruning.plan import Refit

F32: Final = 4
"""Bytes."""
F64: Final = 8
"""Bytes."""
WALK_STATES: Final = 5
"""Hidden states per token that a walk keeps on disk besides the original's."""


def original_rows(sizes: Sizes, work: Work) -> int:
    """Hidden states of the original on disk: of every layer, or of two in turn."""
    rows = (sizes.shape.layers + 1) * work.tokens
    fits = rows * sizes.shape.hidden * F32 <= STATES_BYTES
    return rows if work.keeps and work.refit and fits else 2 * work.tokens


def activations(sizes: Sizes, work: Work) -> int:
    """Routed activations kept, those of a few batches at work."""
    row = int(sizes.shape.top_k * sizes.shape.width * work.keep) * F32
    chunk = min(work.tokens, max(work.batch_tokens, CHUNK))
    return min(KEPT_BYTES, work.tokens * row) + 2 * chunk * row


def side_of(sizes: Sizes, work: Work, refit: Refit) -> int:
    """Neurons of one normal matrix."""
    return min(refit.side, max(int(work.keep * sizes.shape.experts * sizes.shape.width), 1))


def streams(sizes: Sizes, work: Work) -> float:
    """The pruned model's forward, and the original's where its states were not kept."""
    pruned = work.tokens * (dense(sizes, work) + work.keep * routed(sizes))
    return pruned if work.keeps else pruned + forward(sizes, work)


def fit(sizes: Sizes, work: Work, refit: Refit) -> float:
    """One layer's re-fit: S³/3 and 2 S² D in FP64 for each group, in FP32 for each candidate λ.

    A Cholesky factor takes three times as long as a product of as many multiplications.
    """
    shape = sizes.shape
    side = side_of(sizes, work, refit)
    groups = -(-max(int(work.keep * shape.experts * shape.width), 1) // side)
    sweeps = refit.sweeps if groups > 1 else 1
    reached = shape.top_k * shape.width * work.keep
    again = sweeps * work.tokens * reached * (2 * 4 * shape.hidden + reached + 4 * shape.hidden)
    solves = len(refit.ridges) + 2 * sweeps * groups
    return again + solves * (side**3 + 2 * side**2 * shape.hidden)


def forward(sizes: Sizes, work: Work) -> float:
    """The original's, on all tokens."""
    return work.tokens * (dense(sizes, work) + routed(sizes))


def dense(sizes: Sizes, work: Work) -> float:
    """Per token, outside the routed experts: weights once, attention over half a sequence."""
    attention = sizes.shape.layers * 2 * work.length * sizes.shape.hidden
    return 2 * sizes.dense_weights + attention


def routed(sizes: Sizes) -> float:
    """Per token, in the routed experts."""
    return 2 * sizes.sparse * sizes.shape.top_k * sizes.expert_weights


def layer_memory(sizes: Sizes, work: Work) -> int:
    """A layer in FP32, the next one as stored, a batch, or the embedding, which is less seldom."""
    shape = sizes.shape
    batch = work.batch_tokens * (12 * shape.hidden + 4 * shape.width) * F32
    layer = sizes.layer_weights * F32 + sizes.layer_bytes
    return max(layer, 2 * shape.vocabulary * shape.hidden * F32) + batch


def kept_memory(sizes: Sizes, work: Work) -> int:
    """What is kept of a layer: as stored, in FP32 before and after a re-fit, and in between.

    The down projections are there once more while they are fitted.
    """
    weights = 2 * sizes.layer_weights + sizes.layer_weights // 3
    return int(work.keep * (weights * F32 + sizes.layer_bytes))
