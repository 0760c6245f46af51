"""What a run will read, compute, hold and write, before it starts.

All formulas are here, in sizes of the model; seconds follow from rates that are measured on the
machine (``probe.py``) or given. T tokens, G of them take part in the reverse
pass; N experts of I neurons, k chosen per token, D hidden size, V vocabulary, L tokens per
sequence, S the side of a re-fit's normal matrix. A multiplication with its addition counts two.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from moe_serve.calibration.collect import RESERVOIR
from moe_serve.calibration.gradients import LayerGradients
from moe_serve.calibration.reverse import GRADIENT_TOKENS
from moe_serve.calibration.statistics import LayerStatistics
from moe_serve.calibration.trace import KEPT_BYTES as STATES_BYTES
from moe_serve.checkpoint.dtypes import itemsize
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.families import Shape
from moe_serve.pruning.fitting.refit import CHUNK
from moe_serve.pruning.fitting.routed import KEPT_BYTES
from moe_serve.pruning.plan import Refit
from moe_serve.pruning.trial import TRIAL_TOKENS

_F32: Final = 4
_F64: Final = 8
_WALK_STATES: Final = 5
"""Hidden states per token that a walk keeps on disk besides the original's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What the formulas need to know of a checkpoint. Bytes as stored, weights as numbers."""

    shape: Shape
    sparse: int
    """Mixture layers."""
    total_bytes: int
    decoder_bytes: int
    """All decoder layers."""
    expert_bytes: int
    """All routed experts of them."""
    embedding_bytes: int
    head_bytes: int
    """Final norm and output matrix; the embedding again where they are tied."""
    layer_bytes: int
    """The largest layer."""
    layer_weights: int
    """Its weights."""
    dense_weights: int
    """Decoder weights outside the routed experts: every token meets them."""
    lowest: int = 0
    """The first mixture layer."""
    lower_bytes: int = 0
    """All layers below it."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Sizes:
        """Add up the headers; reads no weight."""
        shape = checkpoint.shape
        layers = [checkpoint.layer_tensors(index) for index in range(shape.layers)]
        weights = [sum(_count(e.shape) for e in layer) for layer in layers]
        embedding = checkpoint.entry("model.embed_tokens.weight").size
        head = checkpoint.tensors.get("lm_head.weight")
        experts = checkpoint.expert_bytes()
        lowest = min(experts)
        routed = len(experts) * 3 * shape.experts * shape.width * shape.hidden
        return cls(
            shape=shape,
            sparse=len(experts),
            total_bytes=sum(entry.size for entry in checkpoint.tensors.values()),
            decoder_bytes=sum(entry.size for layer in layers for entry in layer),
            expert_bytes=sum(experts.values()),
            embedding_bytes=embedding,
            head_bytes=checkpoint.entry("model.norm.weight").size
            + (head.size if head else embedding),
            layer_bytes=max(sum(entry.size for entry in layer) for layer in layers),
            layer_weights=max(weights),
            dense_weights=sum(weights) - routed,
            lowest=lowest,
            lower_bytes=sum(entry.size for layer in layers[:lowest] for entry in layer),
        )

    @property
    def expert_weights(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.shape.width * self.shape.hidden

    def statistics_bytes(self, domains: int, *, gradients: bool = True) -> int:
        """On disk, all layers: N normal matrices of side I above all."""
        shape = self.shape
        forms = LayerStatistics.shapes(
            domains=domains,
            experts=shape.experts,
            width=shape.width,
            hidden=shape.hidden,
            reservoir=RESERVOIR,
        )
        kinds = list(forms.values())
        if gradients:
            kinds += LayerGradients.shapes(
                experts=shape.experts, width=shape.width, hidden=shape.hidden
            ).values()
        return self.sparse * sum(itemsize(kind) * _count(form) for kind, form in kinds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """How much a run was asked to do."""

    tokens: int
    """T, all domains."""
    domains: int
    length: int
    batch_tokens: int
    keep: float = 1.0
    reverse: bool = True
    """Whether the method asks what the loss feels."""
    inverts: bool = False
    """Whether the method inverts the normal matrices."""
    compares: bool = False
    """Whether the method runs every expert on the reservoir."""
    alignments: int = 0
    """Pairs of experts in a layer whose neurons are matched."""
    refit: Refit | None = None
    keeps: bool = False
    """Whether calibration leaves the original's hidden states to the re-fit, where they fit."""
    trials: int = 0
    """Walks through the model on a few tokens, by which choices are measured."""
    attempts: int = 0
    """Fits of a layer in all of them."""
    screened: int = 0
    """Fits of a layer with a given λ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Per second, of this machine."""

    flops: float
    """FP32, in products of the experts' shape, on the device."""
    processor_flops: float
    """The same on the processor."""
    read: float
    write: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One part of a run."""

    name: str
    passes: int
    """Times that every expert's weights are read, hashing included."""
    flops: float
    read: int
    """Bytes of the checkpoint, or of what was made from it."""
    written: int
    memory: int
    """Peak, beyond what the interpreter and its libraries take."""
    disk: int
    """Files that the finished output does not keep."""
    processor_flops: float = 0.0
    """Of what stays on the processor whatever the device."""

    def seconds(self, rates: Rates) -> float:
        """Computing, reading and writing one after the other."""
        computing = self.flops / rates.flops + self.processor_flops / rates.processor_flops
        return computing + self.read / rates.read + self.written / rates.write


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """A whole run."""

    steps: tuple[Step, ...]
    output_bytes: int
    base_memory: int

    @property
    def passes(self) -> int:
        """Times that every expert's weights are read, hashing included."""
        return sum(step.passes for step in self.steps)

    @property
    def memory(self) -> int:
        """Peak resident bytes."""
        return self.base_memory + max(step.memory for step in self.steps)

    @property
    def disk(self) -> int:
        """Bytes needed at the output while it runs."""
        return self.output_bytes + max(step.disk for step in self.steps)

    def seconds(self, rates: Rates) -> float:
        """All steps."""
        return sum(step.seconds(rates) for step in self.steps)

    def to_json(self, rates: Rates) -> dict[str, Any]:
        """For ``--dry-run --json``."""
        return {
            "passes": self.passes,
            "peak_memory_bytes": self.memory,
            "disk_bytes": self.disk,
            "output_bytes": self.output_bytes,
            "seconds": round(self.seconds(rates), 1),
            "rates": asdict(rates),
            "steps": [asdict(s) | {"seconds": round(s.seconds(rates), 1)} for s in self.steps],
        }


def calibrate_step(sizes: Sizes, work: Work) -> Step:
    """Forward over all tokens; where the method asks for it, back over at most 16,384 of them."""
    shape, some = sizes.shape, min(GRADIENT_TOKENS, work.tokens)
    normal = work.tokens * shape.top_k * 2 * shape.width**2 * sizes.sparse
    # Attention forward again and backward: 3 forwards, 1 in the lowest mixture's layer, none below.
    # Experts: 5 products instead of 3.
    attended = (3 * (shape.layers - sizes.lowest) - 2) / shape.layers
    reverse = some * (attended * _dense(sizes, work) + 5 / 3 * _routed(sizes))
    reverse += some * (6 * shape.vocabulary * shape.hidden + 2 * shape.hidden**2 * sizes.sparse)
    rows = _original_rows(sizes, work) + ((shape.layers + 3) * some if work.reverse else 0)
    statistics = sizes.statistics_bytes(work.domains, gradients=work.reverse)
    passes = 2 if work.reverse else 1
    read = passes * sizes.decoder_bytes + sizes.embedding_bytes + statistics
    read += sizes.head_bytes - sizes.lower_bytes if work.reverse else 0
    return Step(
        name="calibrate",
        passes=passes,
        flops=_forward(sizes, work) + normal + (reverse if work.reverse else 0.0),
        read=read,
        written=statistics,
        memory=_layer_memory(sizes, work) + shape.experts * shape.width**2 * _F32,
        disk=statistics + rows * shape.hidden * _F32,
    )


def plan_step(sizes: Sizes, work: Work) -> Step:
    """One layer's statistics at a time, and what the method adds.

    Inversions, on the device: Cholesky factor I³/3, inverse 2 I³/3, downdates in rounds 2 I³/3 and
    2 I² D for the weights. On the processor: comparisons of experts, all of them on the reservoir's
    S tokens, with Gram matrices [S, S] in FP64; alignments, inner products of all pairs of neurons,
    3 D weights each; the assignment itself is small beside them.
    """
    shape = sizes.shape
    square = shape.experts * shape.width**2
    experts = sizes.expert_weights * shape.experts
    flops = 0.0
    if work.inverts:
        each = 5 / 3 * shape.width**3 + 2 * shape.width**2 * shape.hidden
        flops = sizes.sparse * shape.experts * each
    apart = sizes.sparse * work.alignments * 6.0 * shape.width**2 * shape.hidden
    outputs = 0
    if work.compares:
        each = 2 * RESERVOIR * (sizes.expert_weights + RESERVOIR * (shape.hidden + shape.experts))
        apart += sizes.sparse * shape.experts * each
        outputs = shape.experts * RESERVOIR * (shape.hidden * _F32 + RESERVOIR * _F64)
    return Step(
        name="plan",
        passes=0,
        flops=flops,
        read=sizes.statistics_bytes(work.domains, gradients=work.reverse) + sizes.expert_bytes // 3,
        written=0,
        memory=2 * square * _F32 + experts * _F32 + outputs,
        disk=0,
        processor_flops=apart,
    )


def apply_step(sizes: Sizes, work: Work) -> Step:
    """Copy what stays; with a re-fit, two streams through all layers and a solve in each.

    Kept neurons' activations stay in memory while they fit, else they are made three times
    (forward, normal equations, residual). The normal equations of a token cost its reached neurons
    of a group squared; solving a group S³/3 for each candidate of λ and once more.
    """
    shape, kept = sizes.shape, int(work.keep * sizes.expert_bytes)
    output = sizes.total_bytes - sizes.expert_bytes + kept
    read = 2 * sizes.total_bytes + output  # Copied or cut; hashed; the output hashed.
    if work.refit is None:
        memory = sizes.layer_weights * _F32 + sizes.layer_bytes
        return Step(
            name="apply", passes=2, flops=0.0, read=read, written=output, memory=memory, disk=0
        )
    side = _side(sizes, work, work.refit)
    memory = _layer_memory(sizes, work) + int(work.keep * sizes.layer_weights) * 2 * _F32
    matrices = 4 * side**2 * _F64 + 4 * side * shape.hidden * _F64
    return Step(
        name="apply",
        passes=2,
        read=read + sizes.decoder_bytes - sizes.expert_bytes + 2 * sizes.embedding_bytes,
        written=output,
        flops=_streams(sizes, work) + sizes.sparse * _fit(sizes, work, work.refit),
        memory=memory + matrices + _activations(sizes, work),
        disk=(_original_rows(sizes, work) + _WALK_STATES * work.tokens) * shape.hidden * _F32,
    )


def trial_step(sizes: Sizes, work: Work) -> Step:
    """Plans tried in memory: the original's stream once, the pruned model's in every trial.

    Each layer attempted costs a fit and a forward.
    """
    refit = work.refit or Refit(ridges=())
    some = replace(work, tokens=min(TRIAL_TOKENS, work.tokens))
    kept = some.tokens * work.keep * _routed(sizes)
    fits = sizes.sparse * _fit(sizes, some, refit) if work.refit else 0.0
    given = sizes.sparse * _fit(sizes, some, Refit(ridges=())) if work.refit else 0.0
    side = _side(sizes, work, refit)
    return Step(
        name="try",
        passes=work.trials,
        flops=work.trials * _streams(sizes, replace(some, keeps=True))
        + _forward(sizes, some)
        + work.attempts * (fits + kept)
        + work.screened * (given + kept),
        read=work.trials * (sizes.decoder_bytes + sizes.embedding_bytes + sizes.head_bytes),
        written=0,
        memory=_layer_memory(sizes, work)
        + int(work.keep * sizes.layer_weights) * 2 * _F32
        + 4 * side * (side + sizes.shape.hidden) * _F64
        + _activations(sizes, some),
        disk=(sizes.shape.layers + 2 + _WALK_STATES) * some.tokens * sizes.shape.hidden * _F32,
    )


def _original_rows(sizes: Sizes, work: Work) -> int:
    """Hidden states of the original on disk: of every layer, or of two in turn."""
    rows = (sizes.shape.layers + 1) * work.tokens
    fits = rows * sizes.shape.hidden * _F32 <= STATES_BYTES
    return rows if work.keeps and work.refit and fits else 2 * work.tokens


def _activations(sizes: Sizes, work: Work) -> int:
    """Routed activations kept, those of a few batches at work."""
    row = int(sizes.shape.top_k * sizes.shape.width * work.keep) * _F32
    chunk = min(work.tokens, max(work.batch_tokens, CHUNK))
    return min(KEPT_BYTES, work.tokens * row) + 2 * chunk * row


def _side(sizes: Sizes, work: Work, refit: Refit) -> int:
    """Neurons of one normal matrix."""
    return min(refit.side, max(int(work.keep * sizes.shape.experts * sizes.shape.width), 1))


def _streams(sizes: Sizes, work: Work) -> float:
    """The pruned model's forward, and the original's where its states were not kept."""
    pruned = work.tokens * (_dense(sizes, work) + work.keep * _routed(sizes))
    return pruned if work.keeps else pruned + _forward(sizes, work)


def _fit(sizes: Sizes, work: Work, refit: Refit) -> float:
    """One layer's re-fit."""
    shape = sizes.shape
    side = _side(sizes, work, refit)
    groups = -(-max(int(work.keep * shape.experts * shape.width), 1) // side)
    sweeps = refit.sweeps if groups > 1 else 1
    reached = shape.top_k * shape.width * work.keep
    again = sweeps * work.tokens * reached * (2 * 4 * shape.hidden + reached + 4 * shape.hidden)
    solves = len(refit.ridges) + sweeps * groups
    return again + solves * (side**3 / 3 + 2 * side**2 * shape.hidden)


def _forward(sizes: Sizes, work: Work) -> float:
    return work.tokens * (_dense(sizes, work) + _routed(sizes))


def _dense(sizes: Sizes, work: Work) -> float:
    """Per token, outside the routed experts: weights once, attention over half a sequence."""
    attention = sizes.shape.layers * 2 * work.length * sizes.shape.hidden
    return 2 * sizes.dense_weights + attention


def _routed(sizes: Sizes) -> float:
    """Per token, in the routed experts."""
    return 2 * sizes.sparse * sizes.shape.top_k * sizes.expert_weights


def _layer_memory(sizes: Sizes, work: Work) -> int:
    """A layer in FP32, the next one as stored, a batch, or the embedding, which is less seldom."""
    shape = sizes.shape
    batch = work.batch_tokens * (12 * shape.hidden + 4 * shape.width) * _F32
    layer = sizes.layer_weights * _F32 + sizes.layer_bytes
    return max(layer, 2 * shape.vocabulary * shape.hidden * _F32) + batch


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
