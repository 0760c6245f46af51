"""From a layer plan to the weights of its blocks, and to a runnable mixture."""

from __future__ import annotations

import dataclasses

import torch

from moe_serve.calibration.mixture import Mixture, Unit, blocks_by_owners, make_units
from moe_serve.checkpoint.dtypes import FLOATING, TORCH_DTYPES
from moe_serve.checkpoint.formats import LayerBlocks
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.table import LayerTable
from moe_serve.errors import PlanError
from moe_serve.pruning.merging import sum_parts
from moe_serve.pruning.plan import LayerPlan


def blocks_from_units(plan: LayerPlan, units: tuple[Unit, ...], dtype: torch.dtype) -> LayerBlocks:
    """The plan's blocks from whole experts held in FP32, rounded to the stored format.

    A copied neuron is exact: FP32 holds every BF16 and FP16 value.
    """
    gates = [unit.gate_FD for unit in units]
    ups = [unit.up_FD for unit in units]
    downs = [unit.down_DF for unit in units]
    return LayerBlocks(
        gate=[sum_parts(b, gates, rows=True).to(dtype) for b in plan.blocks],
        up=[sum_parts(b, ups, rows=True).to(dtype) for b in plan.blocks],
        down=[sum_parts(b, downs, rows=False).to(dtype) for b in plan.blocks],
    )


def pruned_mixture(original: Mixture, table: LayerTable, blocks: LayerBlocks) -> Mixture:
    """The layer as it will be served, in FP32 on the stored (rounded) weights."""
    gate, up, down = ([m.float() for m in matrices] for matrices in blocks)
    return dataclasses.replace(
        original,
        router=dataclasses.replace(original.router, dropped=table.dropped),
        units=make_units(table, gate, up, down),
    )


def with_downs(
    blocks: LayerBlocks, table: LayerTable, units: tuple[Unit, ...], dtype: torch.dtype
) -> LayerBlocks:
    """The blocks with down projections taken from re-fitted units."""
    down = list(blocks.down)
    for unit, (_, numbers) in zip(units, blocks_by_owners(table), strict=True):
        parts = unit.down_DF.to(dtype).split(table.width, dim=1)
        for number, part in zip(numbers, parts, strict=True):
            down[number] = part.contiguous()
    return LayerBlocks(gate=blocks.gate, up=blocks.up, down=down)


def expert_dtype(checkpoint: Checkpoint, layer: int) -> torch.dtype:
    """The number format of a layer's experts.

    Raises:
        PlanError: it is one whose weights cannot be cut or averaged.
    """
    formats = {checkpoint.entry(n).dtype for n in checkpoint.family.expert_names(layer, 0)}
    if len(formats) != 1 or not formats <= FLOATING:
        raise PlanError(
            f"layer {layer}: experts stored as {', '.join(sorted(formats))} cannot be pruned yet",
            where=str(checkpoint.path),
            remedy="start from the BF16, FP16 or FP32 checkpoint",
        )
    return TORCH_DTYPES[formats.pop()]
