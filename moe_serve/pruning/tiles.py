"""Removal in whole tiles, for number formats whose bytes are kept tile by tile.

A tile is a run of consecutive neurons under the same scales. The paths are those of single neurons
with the tile as the unit: all neurons of a tile go together, at the tile's cost.
"""

from __future__ import annotations

import torch

from moe_serve.pruning.obs import RemovalPath, damped_inverse


def tile_path(
    normal_NII: torch.Tensor, down_NDI: torch.Tensor, tile: int, *, ridge: float = 0.01
) -> RemovalPath:
    """Remove whole tiles of every expert in order of least added error under re-fitting.

    Removing tile S adds tr(W_Sᵀ ((H⁻¹)_SS)⁻¹ W_S): Hassibi & Stork 1993, eq. 5, for a group of
    weights. After each removal H⁻¹ and W are downdated.

    Args:
        normal_NII: Σ ω g² h hᵀ per expert.
        down_NDI: down projections.
        tile: neurons per tile; a short last tile goes first, as no block can hold it.
        ridge: λ as a multiple of the layer's mean diagonal.
    """
    experts, width, _ = normal_NII.shape
    order_NI = torch.empty(experts, width, dtype=torch.int64)
    error_NI = torch.empty(experts, width, dtype=torch.float64)
    for expert in range(experts):
        inverse = damped_inverse(normal_NII, expert, ridge)
        weight_ID = down_NDI[expert].T.to(inverse.dtype).clone()
        order_NI[expert], error_NI[expert] = _peel(inverse, weight_ID, tile)
    return RemovalPath(order_NI=order_NI, error_NI=error_NI)


def _peel(
    inverse: torch.Tensor, weight_ID: torch.Tensor, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    left = [torch.arange(i, min(i + tile, len(weight_ID))) for i in range(0, len(weight_ID), tile)]
    order: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []
    total = 0.0
    while left:
        updates = [_update(inverse, weight_ID, tile_S) for tile_S in left]
        costs = [float((weight_ID[s] * u).sum()) for s, u in zip(left, updates, strict=True)]
        best = min(range(len(left)), key=costs.__getitem__)
        if len(left[-1]) < tile:
            best = len(left) - 1
        gone, update = left.pop(best), updates[best]
        rows = inverse[gone]
        weight_ID -= rows.T @ update
        inverse -= rows.T @ torch.linalg.solve(rows[:, gone], rows)
        total += costs[best]
        order.append(gone)
        errors.append(torch.full((len(gone),), total, dtype=torch.float64))
    return torch.cat(order), torch.cat(errors)


def _update(inverse: torch.Tensor, weight_ID: torch.Tensor, tile_S: torch.Tensor) -> torch.Tensor:
    """((H⁻¹)_SS)⁻¹ W_S."""
    update: torch.Tensor = torch.linalg.solve(inverse[tile_S][:, tile_S], weight_ID[tile_S])
    return update


def tiles_by_value(value_NI: torch.Tensor, tile: int) -> RemovalPath:
    """Tiles of least summed value first, a short last one before all."""
    experts, width = value_NI.shape
    tiles = -(-width // tile)
    padded = torch.nn.functional.pad(value_NI.double(), (0, tiles * tile - width))
    value_NT = padded.view(experts, tiles, tile).sum(dim=2)
    key_NT = value_NT.clone()
    if width % tile:
        key_NT[:, -1] = -torch.inf
    order_NT = key_NT.argsort(dim=1, stable=True)
    error_NT = value_NT.gather(1, order_NT).cumsum(dim=1)
    neurons = (order_NT[:, :, None] * tile + torch.arange(tile)).flatten(1)
    inside = neurons < width
    return RemovalPath(
        order_NI=neurons[inside].view(experts, width),
        error_NI=error_NT.repeat_interleave(tile, dim=1)[inside].view(experts, width),
    )
