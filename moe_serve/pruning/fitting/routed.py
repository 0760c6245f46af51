"""Routed activations of a layer: what its re-fit forms normal equations of, and its output.

Making them takes two of an expert's three matrix products, and a re-fit wants them several times.
They are kept in memory while they fit, and made again, bit for bit, where they do not.

Shape suffixes: T tokens, D hidden size, F neurons of one piece.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import torch

from moe_serve.calibration.mixture import Mixture, Unit
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch

KEPT_BYTES: Final = 2**28
"""Activations of a layer that stay in memory."""


class Reached(NamedTuple):
    """One piece on one batch."""

    index_t: torch.Tensor
    """The batch's tokens that reached it, ascending."""
    p_tF: torch.Tensor
    """Its neurons, times the router's weight."""


class Routed:
    """P of every piece of a layer on all tokens. Memory: :data:`KEPT_BYTES`, and one batch."""

    def __init__(
        self,
        mixture: Mixture,
        inputs: States,
        batches: Sequence[Batch],
        *,
        side: int | None = None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            mixture: the layer; a shared expert among its units is a piece like any other.
            inputs: z, the layer's inputs [T, D].
            batches: of the tokens.
            side: units wider than this are cut: an expert is a sum of its neurons.
        """
        self.mixture = mixture
        self.batches = tuple(batches)
        self.pieces = cut(mixture.units, side) if side else mixture.units
        self._inputs = inputs
        self._kept: dict[tuple[int, int], Reached | None] = {}
        self._room = KEPT_BYTES

    def batch(self, number: int, pieces: Iterable[int]) -> Iterator[tuple[int, Reached]]:
        """Those of the pieces that some token of a batch reached, in order."""
        wanted = list(pieces)
        missing = [piece for piece in wanted if (number, piece) not in self._kept]
        made = dict(self._make(number, missing)) if missing else {}
        for piece in wanted:
            found = made.get(piece) or self._kept.get((number, piece))
            if found is not None:
                yield piece, found

    def output(self, number: int) -> torch.Tensor:
        """The layer's output on a batch [T, D]."""
        z_TD = self.batches[number].load_flat(self._inputs)
        inside = any(not unit.owners for unit in self.pieces)
        out_TD = torch.zeros_like(z_TD) if inside else self.mixture.always(z_TD)
        for piece, (index_t, p_tF) in self.batch(number, range(len(self.pieces))):
            out_TD.index_add_(0, index_t, p_tF @ self.pieces[piece].down_DF.T)
        return out_TD

    def _make(self, number: int, pieces: Sequence[int]) -> Iterator[tuple[int, Reached]]:
        units = tuple(self.pieces[piece] for piece in pieces)
        part = dataclasses.replace(self.mixture, units=units)
        numbers = {id(unit): piece for unit, piece in zip(units, pieces, strict=True)}
        for piece in pieces:
            self._kept[number, piece] = None  # Unless some token reached it.
        for unit, index_t, weight_t, h_tF in part.activations(
            self.batches[number].load_flat(self._inputs)
        ):
            piece, found = numbers[id(unit)], Reached(index_t, h_tF * weight_t[:, None])
            size = found.p_tF.nbytes + index_t.nbytes
            if size <= self._room:
                self._room -= size
                self._kept[number, piece] = found
            else:
                del self._kept[number, piece]
            yield piece, found


def cut(units: Sequence[Unit], side: int) -> tuple[Unit, ...]:
    """Cut units wider than ``side``."""
    return tuple(
        unit
        if unit.width <= side
        else dataclasses.replace(
            unit,
            gate_FD=unit.gate_FD[i : i + side],
            up_FD=unit.up_FD[i : i + side],
            down_DF=unit.down_DF[:, i : i + side],
        )
        for unit in units
        for i in range(0, unit.width, side)
    )
