"""Integer codes packed into words, with a scale and a zero per group of input columns.

weight = (code - zero) · scale, codes unsigned. Three layouts of the same numbers:

compressed-tensors, pack-quantized
    ``weight_packed`` [rows, columns / 8], ``weight_scale`` [rows, groups], ``weight_zero_point``
    [rows / 8, groups] where the zero is not 2^(bits - 1), ``weight_shape`` [2].
GPTQ
    ``qweight`` [columns / 8, rows], ``qzeros`` [groups, rows / 8], ``scales`` [groups, rows],
    ``g_idx`` [columns]. Version 1 stores each zero less one.
AWQ
    ``qweight`` [columns, rows / 8], ``qzeros`` [groups, rows / 8], ``scales`` [groups, rows]; the
    codes of a word are interleaved.

(8 codes to a word at 4 bits, 4 at 8.) The first code of a word is in its lowest bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch

from moe_serve.checkpoint.dtypes import TORCH_DTYPES
from moe_serve.checkpoint.quantisation.codes import WORD, Groups, fit_groups, pack, unpack
from moe_serve.checkpoint.quantisation.scheme import Axis, Grid, Matrix, Piece, Scheme

AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""The code at each place of a word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed(Scheme):
    """What the three layouts share. Shapes in comments are [rows, columns] of W."""

    layout: Literal["compressed-tensors", "GPTQ", "AWQ"]
    bits: int
    group: int | None
    """Columns under one scale; ``None``: all."""
    scale_dtype: str
    symmetric: bool
    stored_zero: bool
    zero_offset: int = 0
    """What is taken off a zero before it is stored."""
    shape_dtype: str | None = None
    """Of ``weight_shape``."""
    group_index: bool = False
    """Whether ``g_idx`` is stored."""

    @property
    def name(self) -> str:
        """Layout, bits and group."""
        return f"{self.layout}, {self.bits} bits, groups of {self.group or 'all'} columns"

    @property
    def _order(self) -> tuple[int, ...]:
        return AWQ_ORDER if self.layout == "AWQ" else tuple(range(WORD // self.bits))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The layout's tensors."""
        words, group, order = WORD // self.bits, self.group, self._order
        if self.layout == "compressed-tensors":
            columns = Axis(1, group) if group else None
            found = [
                Piece(
                    ending="weight_packed",
                    dtype="I32",
                    rows=Axis(0),
                    columns=Axis(1, words, order),
                ),
                Piece(ending="weight_scale", dtype=self.scale_dtype, rows=Axis(0), columns=columns),
            ]
            if self.stored_zero:
                ending, rows = "weight_zero_point", Axis(0, words, order)
                found.append(Piece(ending=ending, dtype="I32", rows=rows, columns=columns))
            if self.shape_dtype is not None:
                ending, dtype = "weight_shape", self.shape_dtype
                found.append(Piece(ending=ending, dtype=dtype, fixed=(2,), derived=True))
            return tuple(found)
        columns = Axis(0, group) if group else None
        packed_rows = self.layout == "AWQ"
        found = [
            Piece(
                ending="qweight",
                dtype="I32",
                rows=Axis(1, words, order) if packed_rows else Axis(1),
                columns=Axis(0) if packed_rows else Axis(0, words, order),
            ),
            Piece(
                ending="qzeros",
                dtype="I32",
                rows=Axis(1, words, order),
                columns=columns,
                derived=self.symmetric,
            ),
            Piece(ending="scales", dtype=self.scale_dtype, rows=Axis(1), columns=columns),
        ]
        if self.group_index:
            found.append(Piece(ending="g_idx", dtype="I32", columns=Axis(0), dims=1, derived=True))
        return tuple(found)

    def derive(self, rows: int, columns: int) -> Matrix:
        """``weight_shape``; ``g_idx``, and ``qzeros`` where all zeros are the same."""
        found: Matrix = {}
        if self.shape_dtype is not None:
            dtype = TORCH_DTYPES[self.shape_dtype]
            found["weight_shape"] = torch.tensor([rows, columns], dtype=dtype)
        if self.group_index:
            index = torch.arange(columns, dtype=torch.int32)
            found["g_idx"] = index // (self.group or columns)
        if self.symmetric and self.layout != "compressed-tensors":
            zero = (1 << (self.bits - 1)) - self.zero_offset
            zeros = torch.full((columns // (self.group or columns), rows), zero, dtype=torch.int32)
            found["qzeros"] = pack(zeros, self.bits, 1, self._order)
        return found

    def dequantise(self, matrix: Matrix) -> torch.Tensor:
        """(code - zero) · scale."""
        codes = self._codes(matrix)
        rows, columns = codes.shape
        scale, zero = self._scales(matrix)
        grouped = codes.reshape(rows, scale.shape[1], -1).float()
        grouped -= zero[..., None]
        grouped *= scale[..., None]
        return grouped.reshape(rows, columns)

    def _codes(self, matrix: Matrix) -> torch.Tensor:
        """I32 [rows, columns]."""
        if self.layout == "compressed-tensors":
            return unpack(matrix["weight_packed"], self.bits, 1, self._order)
        dim = 1 if self.layout == "AWQ" else 0
        return unpack(matrix["qweight"], self.bits, dim, self._order).T

    def _scales(self, matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of each row and group, FP32."""
        if self.layout == "compressed-tensors":
            scale = matrix["weight_scale"].float()
            if not self.stored_zero:
                return scale, torch.full_like(scale, float(1 << (self.bits - 1)))
            return scale, unpack(matrix["weight_zero_point"], self.bits, 0, self._order).float()
        zero = unpack(matrix["qzeros"], self.bits, 1, self._order).T + self.zero_offset
        return matrix["scales"].float().T, zero.float()

    def grid(self, matrix: Matrix) -> Grid:
        """Whole numbers from 0 to 2^bits - 1, less the zero, times the scale."""
        columns = self.size(matrix)[1]
        each = self.group or columns
        scale, zero = (t.repeat_interleave(each, dim=1) for t in self._scales(matrix))
        return Grid(scale, zero, self._whole, matrix)

    def _whole(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.round().clamp(0, (1 << self.bits) - 1)

    def encode(self, weight: torch.Tensor, grid: Grid) -> Matrix:
        """Nearest codes under the grid's scales and zeros."""
        codes = self._whole(weight / grid.scale + grid.zero).to(torch.int32)
        if self.layout == "compressed-tensors":
            packed = {"weight_packed": pack(codes, self.bits, 1, self._order)}
        else:
            dim = 1 if self.layout == "AWQ" else 0
            packed = {"qweight": pack(codes.T, self.bits, dim, self._order)}
        return grid.matrix | packed

    def quantise(self, weight: torch.Tensor) -> Matrix:
        """Codes of least squared error per group."""
        rows, columns = weight.shape
        grouped = weight.float().reshape(rows, -1, self.group or columns)
        found = fit_groups(
            grouped,
            self.bits,
            TORCH_DTYPES[self.scale_dtype],
            symmetric=self.symmetric,
            least_zero=self.zero_offset,
        )
        return self._lay_out(found, rows, columns) | self.derive(rows, columns)

    def _lay_out(self, found: Groups, rows: int, columns: int) -> Matrix:
        bits, order = self.bits, self._order
        codes = found.codes.reshape(rows, columns)
        zero = found.zero - self.zero_offset
        if self.layout == "compressed-tensors":
            matrix = {
                "weight_packed": pack(codes, bits, 1, order),
                "weight_scale": found.scale,
            }
            if self.stored_zero:
                matrix["weight_zero_point"] = pack(zero, bits, 0, order)
            return matrix
        return {
            "qweight": pack(codes.T, bits, 1 if self.layout == "AWQ" else 0, order),
            "qzeros": pack(zero.T, bits, 1, order),
            "scales": found.scale.T.contiguous(),
        }
