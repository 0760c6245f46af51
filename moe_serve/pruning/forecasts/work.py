"""What the formulas need to know: a model's sizes, and what a run was asked to do."""

from __future__ import annotations

from dataclasses import dataclass

from moe_serve.calibration.collect import RESERVOIR
from moe_serve.calibration.gradients import GRADIENT_TOKENS, LayerGradients
from moe_serve.calibration.statistics import LayerStatistics
from moe_serve.checkpoint.dtypes import itemsize
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.families import Shape
from moe_serve.pruning.plan import Heal, Refit


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of a checkpoint. Bytes as stored, weights as numbers."""

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
    reverse: int = GRADIENT_TOKENS
    """Tokens of which the method asks what the loss feels, at most."""
    inverts: bool = False
    """Whether the method inverts the normal matrices."""
    compares: int = 0
    """Times that every expert runs on the reservoir."""
    alignments: int = 0
    """Pairs of experts in a layer whose neurons are matched."""
    refit: Refit | None = None
    heal: Heal | None = None
    """How what is kept is trained."""
    keeps: bool = False
    """Whether calibration leaves the original's hidden states to the re-fit, where they fit."""
    trials: int = 0
    """Walks through the model on a few tokens, by which choices are measured."""
    attempts: int = 0
    """Fits of a layer in all of them."""
    screened: int = 0
    """Fits of a layer with a given λ."""
    glanced: int = 0
    """Layers built and run without a fit."""


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
