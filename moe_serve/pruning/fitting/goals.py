"""What a healed layer is trained towards: the residual stream, or at the end the prediction.

Shape suffixes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch.utils.checkpoint import checkpoint

from moe_serve.calibration.decoder import OutputHead
from moe_serve.calibration.states import States

LOGITS: Final = 2**25
"""Logits of a model that are in memory at once."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A sequence's rows in the files of hidden states."""

    start: int
    length: int
    held: bool
    """Whether it tells when to stop."""


def rows(states: States, pieces: Sequence[Piece], device: torch.device) -> torch.Tensor:
    """The hidden states [T, D] of some sequences, one after the other."""
    return torch.cat([states.read(piece.start, piece.length) for piece in pieces]).to(device)


class Goal(Protocol):
    """How far off a layer is."""

    def __call__(self, y_TD: torch.Tensor, pieces: Sequence[Piece]) -> torch.Tensor:
        """The loss [T] of its output on some sequences; differentiable."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamGoal:
    """‖target - y‖²: the residual stream of the original after the layer."""

    target: States
    """What the layer's output should be."""

    def __call__(self, y_TD: torch.Tensor, pieces: Sequence[Piece]) -> torch.Tensor:
        """The loss [T]."""
        return (y_TD - rows(self.target, pieces, y_TD.device)).square().sum(dim=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionGoal:
    """KL(original ‖ pruned) of the next token, in nats: nothing comes after the last layer."""

    head: OutputHead
    final: States
    """The original's residual stream at the end."""
    target: States
    """What the last layer's output should be."""

    def __call__(self, y_TD: torch.Tensor, pieces: Sequence[Piece]) -> torch.Tensor:
        """The loss [T]. Peak memory: some :data:`LOGITS` logits, made again for the gradient."""
        final_TD = rows(self.final, pieces, y_TD.device)
        ours_TD = final_TD + (y_TD - rows(self.target, pieces, y_TD.device))
        size = max(1, LOGITS // len(self.head.weight_VD))
        parts = zip(final_TD.split(size), ours_TD.split(size), strict=True)
        losses: list[torch.Tensor] = [
            checkpoint(self.head.divergence, theirs, ours, use_reentrant=False)
            for theirs, ours in parts
        ]
        return torch.cat(losses)
