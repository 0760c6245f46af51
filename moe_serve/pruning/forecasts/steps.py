"""The steps of a run, one formula each.

T tokens, G of them take part in the reverse pass; the other letters as in ``formulas.py``.
"""

from __future__ import annotations

from dataclasses import replace

from moe_serve.calibration.collect import RESERVOIR
from moe_serve.pruning.forecasts.forecast import Step
from moe_serve.pruning.forecasts.formulas import (
    F32,
    F64,
    WALK_STATES,
    activations,
    dense,
    fit,
    forward,
    kept_memory,
    layer_memory,
    original_rows,
    routed,
    side_of,
    streams,
)
from moe_serve.pruning.forecasts.work import Sizes, Work
from moe_serve.pruning.methods.obs import BATCH_BYTES, by_weights, bytes_of_one, dtype_of
from moe_serve.pruning.plan import Refit
from moe_serve.pruning.trial import MEASURED, TRIAL_TOKENS


def calibrate_step(sizes: Sizes, work: Work) -> Step:
    """Forward over all tokens; where the method asks for it, back over some of them."""
    shape, some = sizes.shape, min(work.reverse, work.tokens)
    normal = work.tokens * shape.top_k * 2 * shape.width**2 * sizes.sparse
    # Attention forward again and backward: 3 forwards, 1 in the lowest mixture's layer, none below.
    # Experts: 5 products instead of 3.
    attended = (3 * (shape.layers - sizes.lowest) - 2) / shape.layers
    reverse = some * (attended * dense(sizes, work) + 5 / 3 * routed(sizes))
    reverse += some * (6 * shape.vocabulary * shape.hidden + 2 * shape.hidden**2 * sizes.sparse)
    rows = original_rows(sizes, work) + (shape.layers + 3) * some
    statistics = sizes.statistics_bytes(work.domains, gradients=bool(some))
    passes = 2 if some else 1
    read = passes * sizes.decoder_bytes + sizes.embedding_bytes + statistics
    read += sizes.head_bytes - sizes.lower_bytes if some else 0
    return Step(
        name="calibrate",
        passes=passes,
        flops=forward(sizes, work) + normal + reverse,
        read=read,
        written=statistics,
        memory=layer_memory(sizes, work) + shape.experts * shape.width**2 * F32,
        disk=statistics + rows * shape.hidden * F32,
    )


def plan_step(sizes: Sizes, work: Work) -> Step:
    """One layer's statistics at a time, and what the method adds.

    Inversions, on the device: Cholesky factor I³/3, inverse 2 I³/3, downdates 2 I³/3; weights in
    the loss's metric 2 I D², and either their inner products 2 I² D and twice 2 I³/3 of downdates,
    or where experts are wide I² D of the weights' own. But for the metric all of it is in FP64 up
    to a width of 1,024. Factors and downdates are no large products: on a processor they took eight
    times as long as such for experts of 512 to 2,048 neurons, four times for 14,336.

    On the processor: comparisons of experts, all of them on the reservoir's S tokens, with Gram
    matrices [S, S] in FP64; alignments, inner products of all pairs of neurons, 3 D weights each;
    the assignment itself is small beside them.
    """
    shape = sizes.shape
    square = shape.experts * shape.width**2
    experts = sizes.expert_weights * shape.experts
    flops, peeled = 0.0, 0
    if work.inverts:
        width, hidden = shape.width, shape.hidden
        if by_weights(width, hidden):
            each = 4 * (5 / 3 * width**3 + width**2 * hidden)
        else:
            each = 2 * width**2 * hidden + 8 * 3 * width**3
        each *= dtype_of(width).itemsize / F32
        flops = sizes.sparse * shape.experts * (each + 2 * width * hidden**2)
        one = bytes_of_one(width, hidden)
        peeled = 2 * max(one, min(BATCH_BYTES, shape.experts * one))
    apart = sizes.sparse * (_aligned(sizes, work.alignments) + _compared(sizes, work.compares))
    outputs = 0
    if work.compares:
        outputs = shape.experts * RESERVOIR * (shape.hidden * F32 + RESERVOIR * F64)
    return Step(
        name="plan",
        passes=0,
        flops=flops,
        read=sizes.statistics_bytes(work.domains, gradients=bool(work.reverse))
        + sizes.expert_bytes // 3,
        written=0,
        memory=2 * square * F32 + experts * F32 + outputs + peeled,
        disk=0,
        processor_flops=apart,
    )


def _aligned(sizes: Sizes, pairs: int) -> float:
    """Inner products of all neurons of so many pairs of experts."""
    return pairs * 6.0 * sizes.shape.width**2 * sizes.shape.hidden


def _compared(sizes: Sizes, times: int) -> float:
    """All experts of a layer on the reservoir, and their Gram matrices, so often."""
    shape = sizes.shape
    grams = 2 * RESERVOIR * (shape.hidden + shape.experts)
    return times * shape.experts * 2.0 * RESERVOIR * (sizes.expert_weights + grams)


def apply_step(sizes: Sizes, work: Work) -> Step:
    """Copy what stays; with a re-fit, two streams through all layers and a solve in each.

    Kept neurons' activations stay in memory while they fit, else they are made three times
    (forward, normal equations, residual). The normal equations of a token cost its reached neurons
    of a group squared; solving a group S³/3 for each candidate of λ, and once more in FP64.
    """
    shape, kept = sizes.shape, int(work.keep * sizes.expert_bytes)
    output = sizes.total_bytes - sizes.expert_bytes + kept
    read = 2 * sizes.total_bytes + output  # Copied or cut; hashed; the output hashed.
    if work.refit is None:
        memory = sizes.layer_weights * F32 + sizes.layer_bytes
        return Step(
            name="apply", passes=2, flops=0.0, read=read, written=output, memory=memory, disk=0
        )
    side = side_of(sizes, work, work.refit)
    memory = layer_memory(sizes, work) + kept_memory(sizes, work)
    matrices = 4 * side**2 * F64 + 4 * side * shape.hidden * F64
    return Step(
        name="apply",
        passes=2,
        read=read + sizes.decoder_bytes - sizes.expert_bytes + 2 * sizes.embedding_bytes,
        written=output,
        flops=streams(sizes, work) + sizes.sparse * fit(sizes, work, work.refit),
        memory=memory + matrices + activations(sizes, work),
        disk=(original_rows(sizes, work) + WALK_STATES * work.tokens) * shape.hidden * F32,
    )


def trial_step(sizes: Sizes, work: Work) -> Step:
    """Plans tried in memory: the original's stream once, the pruned model's in every trial.

    Each layer attempted costs a fit and a forward; one that has no hope, a forward of the tokens
    that measure. Rivals that compare or align experts do so on the processor.
    """
    refit = work.refit or Refit(ridges=())
    some = replace(work, tokens=min(TRIAL_TOKENS, work.tokens))
    kept = some.tokens * work.keep * routed(sizes)
    fits = sizes.sparse * fit(sizes, some, refit) if work.refit else 0.0
    given = sizes.sparse * fit(sizes, some, Refit(ridges=())) if work.refit else 0.0
    side = side_of(sizes, work, refit)
    return Step(
        name="try",
        passes=work.trials,
        flops=work.trials * streams(sizes, replace(some, keeps=True))
        + forward(sizes, some)
        + work.attempts * (fits + kept)
        + work.screened * (given + kept)
        + (work.screened + work.glanced) * MEASURED * kept,
        read=work.trials * (sizes.decoder_bytes + sizes.embedding_bytes + sizes.head_bytes),
        written=0,
        memory=layer_memory(sizes, work)
        + kept_memory(sizes, work)
        + 4 * side * (side + sizes.shape.hidden) * F64
        + activations(sizes, some),
        disk=(sizes.shape.layers + 2 + WALK_STATES) * some.tokens * sizes.shape.hidden * F32,
        processor_flops=sizes.sparse
        * (_aligned(sizes, work.alignments) + _compared(sizes, work.compares)),
    )
