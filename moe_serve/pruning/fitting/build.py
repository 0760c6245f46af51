"""From a layer plan to the weights of its blocks, and to a runnable mixture."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from moe_serve.calibration.mixture import Mixture, Unit, blocks_by_owners, make_units
from moe_serve.checkpoint.form import LayerBlocks
from moe_serve.checkpoint.quantisation import COLUMNS, ROWS, Matrix, Scheme
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.table import LayerTable
from moe_serve.pruning.methods.merging import sum_parts
from moe_serve.pruning.numbers import kept_blocks
from moe_serve.pruning.plan import LayerPlan

_AXES = (ROWS, ROWS, COLUMNS)
"""Where the neurons lie in gate, up and down matrices."""


def build_blocks(
    checkpoint: Checkpoint, layer: int, plan: LayerPlan, units: tuple[Unit, ...]
) -> LayerBlocks:
    """The plan's blocks in the stored number format.

    Neurons that can be copied are: in plain numbers every one that is not a sum (FP32 holds all
    BF16 and FP16 values), in a quantised format those that make up whole tiles, byte for byte
    with their scales. The rest is rounded, blocks of the same experts together. Reads the bytes
    of kept experts of quantised layers once more.

    Args:
        checkpoint: the original.
        layer: its index.
        plan: what to build.
        units: the layer's whole experts in FP32.
    """
    weights = (
        [unit.gate_FD for unit in units],
        [unit.up_FD for unit in units],
        [unit.down_DF for unit in units],
    )
    gate, up, down = (
        _matrices(checkpoint, layer, plan, which, matrices)
        for which, matrices in enumerate(weights)
    )
    return LayerBlocks(gate=gate, up=up, down=down)


def _matrices(
    checkpoint: Checkpoint, layer: int, plan: LayerPlan, which: int, weights: list[torch.Tensor]
) -> list[Matrix]:
    scheme, axis = checkpoint.expert_scheme(layer)[which], _AXES[which]
    if scheme.exact:
        return [
            _on_cpu(scheme.quantise(sum_parts(b, weights, rows=axis == ROWS))) for b in plan.blocks
        ]
    built: dict[int, Matrix] = {}
    kept = kept_blocks(plan, scheme, axis, checkpoint.shape.width)
    expert, stored = -1, Matrix()
    for number in sorted(kept):
        part = plan.blocks[number].parts[0]
        if part.expert != expert:
            name = checkpoint.family.expert_names(layer, part.expert)[which]
            expert, stored = part.expert, checkpoint.stored(name)
        built[number] = scheme.gather(stored, axis, part.neurons)
    for _, numbers in blocks_by_owners(plan.table()):
        if left := [number for number in numbers if number not in kept]:
            sums = [sum_parts(plan.blocks[n], weights, rows=axis == ROWS) for n in left]
            whole = _on_cpu(scheme.quantise(torch.cat(sums, dim=axis)))
            built |= zip(left, cut(scheme, [whole], axis, plan.width), strict=True)
    return [built[number] for number in range(len(plan.blocks))]


def cut(scheme: Scheme, pieces: list[Matrix], axis: int, width: int) -> Iterator[Matrix]:
    """Cut stored matrices into blocks of ``width`` neurons, in order."""
    for piece in pieces:
        total = scheme.size(piece)[axis]
        for first in range(0, total, width):
            yield scheme.gather(piece, axis, range(first, min(first + width, total)))


def _on_cpu(matrix: Matrix) -> Matrix:
    return {ending: tensor.cpu() for ending, tensor in matrix.items()}


def pruned_mixture(
    original: Mixture,
    table: LayerTable,
    blocks: LayerBlocks,
    schemes: tuple[Scheme, Scheme, Scheme],
) -> Mixture:
    """The layer as it will be served, in FP32 on the stored (rounded) weights."""
    device = original.router.weight_ND.device
    gate, up, down = (
        [scheme.dequantise(matrix).to(device) for matrix in matrices]
        for scheme, matrices in zip(schemes, blocks.matrices, strict=True)
    )
    return dataclasses.replace(
        original,
        router=dataclasses.replace(original.router, dropped=table.dropped),
        units=make_units(table, gate, up, down),
    )


def with_units(
    blocks: LayerBlocks,
    table: LayerTable,
    units: tuple[Unit, ...],
    schemes: tuple[Scheme, Scheme, Scheme],
) -> LayerBlocks:
    """The blocks with trained weights, one unit for each set of owners, rounded as stored."""
    stored: list[list[Matrix]] = [[Matrix()] * table.blocks for _ in range(3)]
    for unit, (_, numbers) in zip(units, blocks_by_owners(table), strict=True):
        weights = (unit.gate_FD, unit.up_FD, unit.down_DF)
        for which, (scheme, axis) in enumerate(zip(schemes, _AXES, strict=True)):
            whole = _on_cpu(scheme.quantise(weights[which]))
            for number, part in zip(numbers, cut(scheme, [whole], axis, table.width), strict=True):
                stored[which][number] = part
    return blocks._replace(gate=stored[0], up=stored[1], down=stored[2])


def with_downs(
    blocks: LayerBlocks, table: LayerTable, stored: tuple[tuple[Matrix, ...], ...], scheme: Scheme
) -> LayerBlocks:
    """The blocks with re-fitted down projections, one or more stored pieces for each unit.

    Constants come after the blocks' units, a piece for each.
    """
    down = list(blocks.down)
    owned = blocks_by_owners(table)
    constants_RD = blocks.constants_RD
    if constants_RD is not None and len(constants_RD):
        values = [scheme.dequantise(piece)[:, 0].cpu() for (piece,) in stored[len(owned) :]]
        constants_RD = torch.stack(values)
    for pieces, (_, numbers) in zip(stored[: len(owned)], owned, strict=True):
        parts = cut(scheme, [_on_cpu(piece) for piece in pieces], COLUMNS, table.width)
        for number, part in zip(numbers, parts, strict=True):
            down[number] = part
    return blocks._replace(down=down, constants_RD=constants_RD)
