"""Batches of sequences, and their hidden states between layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from moe_serve.calibration.decoder import Decoder
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.states import States


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Consecutive sequences of equal length."""

    sequences: tuple[int, ...]
    shape: tuple[int, int]
    """B sequences, L tokens each."""
    tokens: slice
    """Positions of its tokens among all."""
    device: torch.device

    def load(self, states: States) -> torch.Tensor:
        """Its hidden states [B, L, D]."""
        rows = states.read(self.tokens.start, self.tokens.stop - self.tokens.start)
        return rows.to(self.device).view(*self.shape, -1)

    def load_flat(self, states: States) -> torch.Tensor:
        """Its rows [B·L, D]."""
        return self.load(states).flatten(0, 1)

    def store(self, states: States, x_BLD: torch.Tensor) -> None:
        """Write its hidden states."""
        states.write(self.tokens.start, x_BLD.reshape(-1, x_BLD.shape[-1]))


def batches(sequences: Sequences, batch_tokens: int, device: torch.device) -> Iterator[Batch]:
    """All sequences in order; at most ``batch_tokens`` tokens, at least one sequence, at once."""
    offsets = sequences.offsets
    for indices in sequences.batches(batch_tokens):
        length = len(sequences.tokens[indices[0]])
        start = offsets[indices[0]]
        yield Batch(
            sequences=indices,
            shape=(len(indices), length),
            tokens=slice(start, start + len(indices) * length),
            device=device,
        )


def embed(decoder: Decoder, sequences: Sequences, into: States) -> None:
    """Write the embedding of every token, the first layer's input."""
    weight_VD = decoder.embedding()
    for tokens, start in zip(sequences.tokens, sequences.offsets, strict=True):
        into.write(start, weight_VD[torch.from_numpy(np.ascontiguousarray(tokens))])
