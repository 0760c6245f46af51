"""Rounding re-fitted down projections so that later neurons make up for earlier ones' rounding.

With H the re-fit's normal matrix (penalty included) and U the upper Cholesky factor of H⁻¹, neuron
j is rounded to the nearest stored value and its error e_j / U_jj times the rest of row j of U is
taken off the neurons not rounded yet: GPTQ, arXiv 2210.17323, algorithm 1. The scales of a tile are
fitted when its first neuron is reached.

Shape suffixes: D hidden size, F neurons, T neurons of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_serve.checkpoint.quantisation import COLUMNS, Matrix, Scheme


def round_neurons(
    w_FD: torch.Tensor,
    hessian_FF: torch.Tensor,
    scheme: Scheme,
    units: Sequence[slice],
) -> list[Matrix]:
    """The stored down projection of each unit.

    Args:
        w_FD: the re-fitted weights, one row per neuron, on the processor.
        hessian_FF: H, positive definite, wherever it is.
        scheme: of the down projections.
        units: where each unit's neurons lie; in order, without gaps.

    Raises:
        torch.linalg.LinAlgError: H is not positive definite.
    """
    if scheme.exact:
        return [scheme.quantise(w_FD[unit].T) for unit in units]
    inverse_FF = torch.cholesky_inverse(torch.linalg.cholesky(hessian_FF.cpu()))
    factor_FF = torch.linalg.cholesky(inverse_FF, upper=True).float()
    left_DF = w_FD.float().T.contiguous()
    stored = []
    for unit in units:
        # A scale for all neurons of an expert is fitted to all of them at once.
        step = unit.stop - unit.start if scheme.shared_along(COLUMNS) else scheme.tile(COLUMNS)
        tiles = []
        for first in range(unit.start, unit.stop, step):
            last = min(first + step, unit.stop)
            tiles.append(_round_tile(left_DF, factor_FF, scheme, first, last))
        stored.append(scheme.join(tiles, COLUMNS, unit.stop - unit.start, w_FD.shape[1]))
    return stored


def _round_tile(
    left_DF: torch.Tensor, factor_FF: torch.Tensor, scheme: Scheme, first: int, last: int
) -> Matrix:
    """Round neurons ``first`` to ``last``; what they leave goes to those after them."""
    tile_DT = left_DF[:, first:last].clone()
    grid = scheme.grid(scheme.quantise(tile_DT))
    error_DT = torch.empty_like(tile_DT)
    factor_TT = factor_FF[first:last, first:last]
    for j in range(last - first):
        rounded_D = grid.nearest(tile_DT[:, j], j)
        error_DT[:, j] = (tile_DT[:, j] - rounded_D) / factor_TT[j, j]
        tile_DT[:, j + 1 :] -= error_DT[:, j, None] * factor_TT[None, j, j + 1 :]
        tile_DT[:, j] = rounded_D
    left_DF[:, last:] -= error_DT @ factor_FF[first:last, last:]
    return scheme.encode(tile_DT, grid)
