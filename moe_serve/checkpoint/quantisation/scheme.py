"""The geometry of a stored matrix: which tensors, and which rows and columns each index covers.

A matrix W [rows, columns] computes y = W x. A scheme stores it as one or more tensors; an index of
a stored tensor along one of its dimensions covers ``step`` consecutive rows or columns of W. From
that table alone follow shapes, what can be cut out exactly, and what can be put side by side.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from moe_serve.checkpoint.quantisation.codes import WORD, pack, unpack

Matrix = dict[str, torch.Tensor]
"""A stored matrix: name ending → tensor."""

ROWS: Final = 0
COLUMNS: Final = 1


class InexactJoin(ValueError):
    """Matrices that share a scale along the join have different ones."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Where the rows (or columns) of W lie in a stored tensor."""

    dim: int
    step: int = 1
    """Rows (or columns) of W that one index covers."""
    order: tuple[int, ...] | None = None
    """Where an index is a word of codes: the code at each place, from the lowest bits up. Words
    can be taken apart and filled anew without changing a code."""

    def take(self, tensor: torch.Tensor, index: Sequence[int], total: int) -> torch.Tensor:
        """Rows (or columns) ``index`` of ``total`` from a stored tensor.

        Raises:
            ValueError: they are not whole tiles.
        """
        if self.order is not None:
            bits = WORD // len(self.order)
            codes = unpack(tensor, bits, self.dim, self.order)
            picked = codes.index_select(self.dim, torch.tensor(list(index), device=codes.device))
            return pack(picked, bits, self.dim, self.order)
        tiles = _tiles(index, self.step, total)
        if tiles is None:
            raise ValueError(f"not whole tiles of {self.step}")
        return tensor.index_select(self.dim, torch.tensor(tiles, device=tensor.device))


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One stored tensor of a matrix."""

    ending: str
    dtype: str
    """safetensors element type."""
    rows: Axis | None = None
    """``None``: the same for all rows."""
    columns: Axis | None = None
    dims: int = 2
    derived: bool = False
    """Its values follow from the matrix's shape alone."""
    fixed: tuple[int, ...] | None = None
    """Its shape, where that does not depend on the matrix's."""

    def axis(self, which: int) -> Axis | None:
        """Rows or columns."""
        return self.rows if which == ROWS else self.columns

    def shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """The stored shape for W [rows, columns]."""
        if self.fixed is not None:
            return self.fixed
        shape = [1] * self.dims
        for axis, count in ((self.rows, rows), (self.columns, columns)):
            if axis is not None:
                shape[axis.dim] = -(-count // axis.step)
        return tuple(shape)


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that a matrix can take under given scales: (code - zero) · scale."""

    scale: torch.Tensor
    """FP32 [rows, columns]."""
    zero: torch.Tensor
    """FP32 [rows, columns]; zeros where codes are signed."""
    codes: Callable[[torch.Tensor], torch.Tensor]
    """Rounds to the nearest code, as FP32."""
    matrix: Matrix
    """A stored matrix with these scales."""

    def nearest(self, column: torch.Tensor, number: int) -> torch.Tensor:
        """The nearest values to one column [rows]."""
        scale, zero = self.scale[:, number], self.zero[:, number]
        return (self.codes(column / scale + zero) - zero) * scale


class Scheme(ABC):
    """A number format of matrices. Subclasses are frozen dataclasses: equal settings are equal."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For people: plan, manifest, messages."""

    @property
    @abstractmethod
    def pieces(self) -> tuple[Piece, ...]:
        """The stored tensors; the first covers W without rounding up."""

    @abstractmethod
    def dequantise(self, matrix: Matrix) -> torch.Tensor:
        """W [rows, columns], FP32."""

    @abstractmethod
    def quantise(self, weight: torch.Tensor) -> Matrix:
        """The nearest stored form of W [rows, columns] that this scheme finds."""

    @abstractmethod
    def grid(self, matrix: Matrix) -> Grid:
        """What W can be under the scales of a stored matrix."""

    @abstractmethod
    def encode(self, weight: torch.Tensor, grid: Grid) -> Matrix:
        """Store W [rows, columns] under the scales of a grid, rounded to it."""

    @property
    def exact(self) -> bool:
        """Whether numbers are stored one by one, so that any neuron can be copied as it is."""
        return False

    def derive(self, rows: int, columns: int) -> Matrix:
        """The tensors whose values follow from the shape."""
        del rows, columns
        return {}

    def tile(self, axis: int) -> int:
        """Rows (or columns) that have to stay together for their bytes to be kept."""
        found = (piece.axis(axis) for piece in self.pieces if not piece.derived)
        return math.lcm(*(a.step for a in found if a is not None and a.order is None))

    def shared_along(self, axis: int) -> bool:
        """Whether something is stored once for all rows (or columns)."""
        return any(p.axis(axis) is None and not p.derived for p in self.pieces)

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Stored shapes for W [rows, columns], by ending."""
        return {piece.ending: piece.shape(rows, columns) for piece in self.pieces}

    def shape_of(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Rows and columns of W from the stored shapes."""
        piece = self.pieces[0]
        shape = stored[piece.ending]
        if piece.rows is None or piece.columns is None:
            raise ValueError("the first piece covers rows and columns")
        rows, columns = piece.rows, piece.columns
        return shape[rows.dim] * rows.step, shape[columns.dim] * columns.step

    def tensors(self, name: str) -> dict[str, str]:
        """Names of the tensors that store matrix ``name`` (ending in ``.weight``), by ending.

        A plain tensor of another name stands for itself.
        """
        prefix = name.removesuffix("weight")
        if prefix == name:
            return {piece.ending: name for piece in self.pieces}
        return {piece.ending: prefix + piece.ending for piece in self.pieces}

    def size(self, matrix: Matrix) -> tuple[int, int]:
        """Rows and columns of a stored matrix."""
        return self.shape_of({ending: tuple(t.shape) for ending, t in matrix.items()})

    def fits(self, axis: int, index: Sequence[int], total: int) -> bool:
        """Whether rows (or columns) ``index`` of ``total`` are whole tiles, each in order."""
        return _tiles(index, self.tile(axis), total) is not None

    def gather(self, matrix: Matrix, axis: int, index: Sequence[int]) -> Matrix:
        """Rows (or columns) ``index`` of W, every code and scale as it was.

        Raises:
            ValueError: they are not whole tiles.
        """
        total = self.size(matrix)[axis]
        taken: Matrix = {}
        for piece in self.pieces:
            tensor, where = matrix[piece.ending], piece.axis(axis)
            if piece.derived:
                continue
            if where is not None:
                tensor = where.take(tensor, index, total)
            taken[piece.ending] = tensor
        return taken | self.derive(*self.size(taken))

    def join(self, parts: Sequence[Matrix], axis: int, length: int, across: int) -> Matrix:
        """Matrices side by side along ``axis``, zeros up to ``length``.

        Args:
            parts: may be empty; all but the last are whole tiles.
            axis: rows or columns.
            length: rows (or columns) of the result.
            across: the result's other dimension.

        Raises:
            InexactJoin: the scheme stores one scale for all of them, and theirs differ.
        """
        rest = length - sum(self.size(part)[axis] for part in parts)
        padding: Matrix | None = None
        if rest:
            shape = (rest, across) if axis == ROWS else (across, rest)
            padding = self.quantise(torch.zeros(shape))
        joined: Matrix = {}
        for piece in self.pieces:
            if piece.derived:
                continue
            tensors = [part[piece.ending] for part in parts]
            where = piece.axis(axis)
            if where is None:
                tensors = tensors or ([padding[piece.ending]] if padding else [])
                if any(not torch.equal(t, tensors[0]) for t in tensors[1:]):
                    raise InexactJoin(f"{self.name}: {piece.ending} differs between blocks")
                joined[piece.ending] = tensors[0]
            else:
                if padding is not None:
                    tensors.append(padding[piece.ending])
                joined[piece.ending] = torch.cat(tensors, dim=where.dim)
        shape = (length, across) if axis == ROWS else (across, length)
        return joined | self.derive(*shape)


def _tiles(index: Sequence[int], step: int, total: int) -> list[int] | None:
    """Numbers of the tiles that ``index`` lists one after the other; ``None`` if it does not.

    The last tile of ``total`` may be short; it can only come last.
    """
    if step == 1:
        return list(index)
    tiles = []
    for at in range(0, len(index), step):
        group = list(index[at : at + step])
        first = group[0]
        whole = min(step, total - first)
        if first % step or group != list(range(first, first + whole)):
            return None
        tiles.append(first // step)
    return tiles
