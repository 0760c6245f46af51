"""Plain numbers: BF16, FP16, FP32, FP64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_serve.checkpoint.dtypes import TORCH_DTYPES
from moe_serve.checkpoint.quantisation.scheme import Axis, Grid, Matrix, Piece, Scheme


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain(Scheme):
    """One floating-point number per weight."""

    dtype: str

    @property
    def name(self) -> str:
        """The element type."""
        return self.dtype

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The weight itself."""
        return (Piece(ending="weight", dtype=self.dtype, rows=Axis(0), columns=Axis(1)),)

    @property
    def exact(self) -> bool:
        """Any neuron can be copied as it is."""
        return True

    def dequantise(self, matrix: Matrix) -> torch.Tensor:
        """FP32 holds every BF16 and FP16 value."""
        return matrix["weight"].float()

    def quantise(self, weight: torch.Tensor) -> Matrix:
        """Rounded to nearest."""
        return {"weight": weight.to(TORCH_DTYPES[self.dtype])}

    def grid(self, matrix: Matrix) -> Grid:
        """Every number of the format, whatever the others are."""
        one = torch.ones(matrix["weight"].shape)
        dtype = TORCH_DTYPES[self.dtype]
        return Grid(one, one * 0.0, lambda w: w.to(dtype).float(), matrix)

    def encode(self, weight: torch.Tensor, grid: Grid) -> Matrix:
        """Rounded to nearest."""
        del grid
        return self.quantise(weight)
