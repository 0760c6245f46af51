"""FP8 (E4M3) with scales per tile, per row or per matrix.

``weight`` holds the codes; the weight is code times scale. DeepSeek-V3 (arXiv 2412.19437, section
3.3.2) and Qwen3-FP8 store ``weight_scale_inv`` per 128 × 128 tile; compressed-tensors'
float-quantized stores ``weight_scale`` per row, per tile or per matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from moe_serve.checkpoint.dtypes import TORCH_DTYPES
from moe_serve.checkpoint.quantisation.scheme import Axis, Grid, Matrix, Piece, Scheme

LARGEST: Final = 448.0
"""The largest finite E4M3 value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8(Scheme):
    """E4M3 codes under one scale per tile."""

    scale: str
    """Ending of the scale's name."""
    scale_dtype: str
    scale_dims: int
    row_step: int | None
    """Rows under one scale; ``None``: all."""
    column_step: int | None
    """Columns under one scale; ``None``: all."""
    powers_of_two: bool = False
    """Whether scales are (DeepSeek-V3.1's ``scale_fmt: ue8m0``)."""

    @property
    def name(self) -> str:
        """With the tile it scales."""
        return f"FP8 E4M3, one scale for {self.row_step or 'all'} × {self.column_step or 'all'}"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Codes and scales."""
        return (
            Piece(ending="weight", dtype="F8_E4M3", rows=Axis(0), columns=Axis(1)),
            Piece(
                ending=self.scale,
                dtype=self.scale_dtype,
                rows=Axis(0, self.row_step) if self.row_step else None,
                columns=Axis(1, self.column_step) if self.column_step else None,
                dims=self.scale_dims,
            ),
        )

    def dequantise(self, matrix: Matrix) -> torch.Tensor:
        """Code times scale; an E4M3 NaN (0x7F, 0xFF) stays NaN."""
        codes = matrix["weight"].float()
        return codes * self._spread(matrix[self.scale].float(), *codes.shape)

    def quantise(self, weight: torch.Tensor) -> Matrix:
        """The scale puts each tile's largest magnitude on the largest code."""
        rows, columns = weight.shape
        tall, wide = self.row_step or rows, self.column_step or columns
        padded = torch.nn.functional.pad(weight.float(), (0, -columns % wide, 0, -rows % tall))
        tiled = padded.view(padded.shape[0] // tall, tall, padded.shape[1] // wide, wide)
        largest = tiled.abs().amax(dim=(1, 3))
        dtype = TORCH_DTYPES[self.scale_dtype]
        scale = torch.where(largest > 0, largest / LARGEST, 1.0)
        if self.powers_of_two:
            scale = scale.log2().ceil().exp2()
        scale = scale.clamp(min=torch.finfo(dtype).tiny).to(dtype)
        codes = weight.float() / self._spread(scale.float(), rows, columns)
        return {
            "weight": _codes(codes),
            self.scale: scale.reshape(self.pieces[1].shape(rows, columns)),
        }

    def grid(self, matrix: Matrix) -> Grid:
        """E4M3 codes times each weight's scale."""
        rows, columns = matrix["weight"].shape
        scale = self._spread(matrix[self.scale].float(), rows, columns).expand(rows, columns)
        return Grid(scale, torch.zeros_like(scale), lambda w: _codes(w).float(), matrix)

    def encode(self, weight: torch.Tensor, grid: Grid) -> Matrix:
        """Nearest codes under the grid's scales."""
        return {"weight": _codes(weight / grid.scale), self.scale: grid.matrix[self.scale]}

    def _spread(self, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """The scale of every weight, by broadcasting where one counts for all."""
        scale = scale.reshape(
            -(-rows // self.row_step) if self.row_step else 1,
            -(-columns // self.column_step) if self.column_step else 1,
        )
        if (self.row_step or 1) > 1:
            scale = scale.repeat_interleave(self.row_step or 1, dim=0)[:rows]
        if (self.column_step or 1) > 1:
            scale = scale.repeat_interleave(self.column_step or 1, dim=1)[:, :columns]
        return scale


def _codes(scaled: torch.Tensor) -> torch.Tensor:
    """Nearest E4M3 values, the largest where there is none."""
    return scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
