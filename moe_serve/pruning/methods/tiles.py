"""Removal in whole tiles, for number formats whose bytes are kept tile by tile.

A tile is a run of consecutive neurons under the same scales. The paths are those of single neurons
with the tile as the unit: all neurons of a tile go together, at the tile's cost.
"""

from __future__ import annotations

import torch

from moe_serve.pruning.device import CPU
from moe_serve.pruning.methods.obs import ROUNDS, RemovalPath, damped_inverse, in_metric


def tile_path(
    normal_NII: torch.Tensor,
    down_NDI: torch.Tensor,
    tile: int,
    *,
    root_DD: torch.Tensor | None = None,
    ridge: float = 0.01,
    device: torch.device = CPU,
) -> RemovalPath:
    """Remove whole tiles of every expert in order of least added error under re-fitting.

    Removing tile S adds tr(W_Sᵀ ((H⁻¹)_SS)⁻¹ W_S): Hassibi & Stork 1993, eq. 5, for a group of
    weights. After each removal H⁻¹ and W are downdated.

    Args:
        normal_NII: Σ ω g² h hᵀ per expert.
        down_NDI: down projections.
        tile: neurons per tile; a short last tile goes first, as no block can hold it.
        root_DD: R of the metric R Rᵀ in which the output's error counts; the plain one without.
        ridge: λ as a multiple of the layer's mean diagonal.
        device: where it is computed; what is given and returned stays on the processor.
    """
    experts, width, _ = normal_NII.shape
    order_NI = torch.empty(experts, width, dtype=torch.int64)
    error_NI = torch.empty(experts, width, dtype=torch.float64)
    root_DD = root_DD if root_DD is None else root_DD.to(device)
    for expert in range(experts):
        inverse = damped_inverse(normal_NII, expert, ridge, device)
        weight_1ID = in_metric(down_NDI[expert : expert + 1], root_DD, device).to(inverse.dtype)
        order_NI[expert], error_NI[expert] = peel(inverse, weight_1ID[0], tile)
    return RemovalPath(order_NI=order_NI, error_NI=error_NI)


def peel(
    inverse: torch.Tensor, weight_ID: torch.Tensor, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove tiles, the dearest last; up to 192 tiles one at a time, else several per round.

    Args:
        inverse: H⁻¹ [I, I]; used up.
        weight_ID: the down projection, on the same device; used up.
        tile: neurons per tile.

    Returns:
        Order of removal [I] and total error [I], on that device.
    """
    width, hidden = weight_ID.shape
    device = weight_ID.device
    tiles, step = width // tile, -(-(width // tile) // ROUNDS)
    order: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []
    total = torch.zeros((), dtype=torch.float64, device=device)

    def remove(gone: torch.Tensor, shares: torch.Tensor) -> None:
        nonlocal total
        rows = inverse[gone]
        pivot = rows[:, gone].clone()
        update = torch.linalg.solve(pivot, weight_ID[gone])
        added = (weight_ID[gone] * update).sum(dtype=torch.float64)
        weight_ID.sub_(rows.T @ update)
        inverse.sub_(rows.T @ torch.linalg.solve(pivot, rows))
        # What is left of a removed neuron is zero up to rounding; make its pivot harmless.
        weight_ID[gone] = 0.0
        inverse.diagonal()[gone] = 1.0
        order.append(gone)
        errors.append(total + added * shares)
        total = total + added

    if short := width - tiles * tile:
        ones = torch.ones(short, dtype=torch.float64, device=device)
        remove(torch.arange(tiles * tile, width, device=device), ones)
    alive = torch.ones(tiles, dtype=torch.bool, device=device)
    numbers = torch.arange(tiles * tile, device=device).view(tiles, tile)
    left = tiles
    while left:
        whole = inverse[: tiles * tile, : tiles * tile].view(tiles, tile, tiles, tile)
        pivots = whole.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        weights = weight_ID[: tiles * tile].view(tiles, tile, hidden)
        cost = (weights * torch.linalg.solve(pivots, weights)).sum(dim=(1, 2))
        count = min(step, left)
        cost = cost.masked_fill(~alive, torch.inf)
        chosen = torch.topk(cost, count, largest=False, sorted=True).indices
        alive[chosen] = False
        left -= count
        shares = torch.arange(1, count + 1, dtype=torch.float64, device=device) / count
        remove(numbers[chosen].flatten(), shares.repeat_interleave(tile))
    return torch.cat(order), torch.cat(errors)


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
