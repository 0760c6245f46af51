"""What a method sees of one layer: its statistics, and its weights when it asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from moe_serve.calibration.gradients import LayerGradients
from moe_serve.calibration.mixture import Mixture, read_mixture
from moe_serve.calibration.statistics import LayerStatistics
from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.errors import UsageError
from moe_serve.families import Shape
from moe_serve.pruning.device import CPU

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How much of each layer may stay."""

    keep: float
    """Share of the routed experts' bytes, in (0, 1]."""
    block_width: int
    """b, neurons per block."""
    experts: int | None = None
    """Whole experts per layer, where the request was made in experts."""
    tile: int = 1
    """Neurons that go together: more than one where whole tiles of a number format are kept."""
    uniform: bool = False
    """Every expert keeps the same number of neurons: what stock software can load."""
    across_layers: bool = True
    """Blocks go where the loss needs them in the whole model; otherwise every layer keeps the
    same share."""
    constants: bool = False
    """Experts that go leave a constant, and the router goes on selecting them."""
    seed: int = 0
    """For methods that draw lots."""
    coefficients: str | None = None
    """How the members of a merged group are weighted; ``None``: as the method does."""
    drop_when_better: bool | None = None
    """Whether a group is merged only where that beats dropping; ``None``: as the method does."""

    def whole_experts(self, shape: Shape, layers: int = 1) -> int:
        """Experts that so many layers may keep whole, what stands for the others included."""
        if self.experts is not None:
            return layers * self.experts
        total, constant = layers * shape.experts, 0.0
        if self.constants:
            constant = 1.0 / (3 * shape.width)  # A vector [D] for three matrices of [I, D].
        kept = (self.keep - constant) * total / (1.0 - constant)
        return total if self.keep == 1.0 else max(int(kept + 1e-9), 0)

    def blocks(self, shape: Shape, layers: int = 1) -> int:
        """Blocks that so many layers may store: never more bytes than ``keep`` allows."""
        neurons = layers * shape.experts * shape.width
        return int(self.keep * neurons / self.block_width + 1e-9)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerView:
    """One layer of an original checkpoint."""

    index: int
    checkpoint: Checkpoint
    statistics: LayerStatistics | None
    loss: LayerGradients | None
    tile: int = 1
    """Consecutive neurons that a method has to keep or remove together."""
    device: torch.device = CPU
    """Where large matrices are inverted; all that a method sees is on the processor."""

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        statistics: Statistics | None,
        index: int,
        *,
        tile: int = 1,
        device: torch.device = CPU,
    ) -> LayerView:
        """A layer with what statistics hold of it."""
        return cls(
            index=index,
            checkpoint=checkpoint,
            statistics=statistics.layer(index) if statistics is not None else None,
            loss=statistics.gradients(index) if statistics and statistics.has_gradients else None,
            tile=tile,
            device=device,
        )

    @property
    def shape(self) -> Shape:
        """The model's sizes."""
        return self.checkpoint.shape

    def observed(self) -> LayerStatistics:
        """The statistics.

        Raises:
            UsageError: there are none.
        """
        return _present(self.statistics)

    def gradients(self) -> LayerGradients:
        """What the reverse pass found.

        Raises:
            UsageError: there are no statistics.
        """
        return _present(self.loss)

    def mixture(self) -> Mixture:
        """Router and experts, FP32."""
        return read_mixture(self.checkpoint, self.index, CPU)

    def projection(self, which: int) -> torch.Tensor:
        """All experts' gate (0) or up (1) [N, I, D], or down (2) [N, D, I], FP32."""
        family = self.checkpoint.family
        names = [family.expert_names(self.index, e)[which] for e in range(self.shape.experts)]
        return torch.stack([self.checkpoint.weight(name) for name in names])


def _present(found: _T | None) -> _T:
    if found is None:
        raise UsageError(
            "this method needs calibration texts",
            where="--method",
            remedy="give --calibration PATH, or a method that works from the weights alone",
        )
    return found
