"""What pruning does to the stored numbers: which bytes are kept, which are rounded again."""

from __future__ import annotations

import math

from moe_serve.calibration.mixture import blocks_by_owners
from moe_serve.checkpoint.quantisation import COLUMNS, ROWS, Scheme
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.pruning.plan import LayerPlan, NumberFormat

PROJECTIONS = ("gate", "up", "down")
_AXES = (ROWS, ROWS, COLUMNS)


def tile_width(checkpoint: Checkpoint) -> int:
    """Neurons that have to stay together for their bytes and scales to be kept.

    A whole number of these fills a block: formats that scale groups of 128 columns can't store
    narrower down projections.
    """
    tiles = {
        scheme.tile(axis)
        for layer in checkpoint.family.moe_layers(checkpoint.config)
        for scheme, axis in zip(checkpoint.expert_scheme(layer), _AXES, strict=True)
    }
    return math.lcm(*tiles)


def removal_unit(checkpoint: Checkpoint, *, refit: bool) -> int:
    """Neurons that have to be kept or removed together for bytes to be kept.

    A re-fit rounds down projections in any case, so that only gate and up matter then: rows of
    FP8 under one scale per tile go by tiles, rows of packed integers one by one: words are filled
    anew with the same codes.
    """
    return math.lcm(
        *(
            scheme.tile(axis)
            for layer in checkpoint.family.moe_layers(checkpoint.config)
            for projection, scheme, axis in zip(
                PROJECTIONS, checkpoint.expert_scheme(layer), _AXES, strict=True
            )
            if not (refit and projection == "down")
        )
    )


def kept_blocks(plan: LayerPlan, scheme: Scheme, axis: int, width: int) -> set[int]:
    """Blocks whose stored numbers are the original's.

    Where one scale serves all of an expert's neurons, its blocks are kept together or not at all:
    rounded apart they could not be put side by side again.

    Args:
        plan: the layer's.
        scheme: of one of its projections.
        axis: where that projection has its neurons.
        width: I, neurons of an original expert.
    """
    kept = {
        number
        for number, block in enumerate(plan.blocks)
        if len(block.parts) == 1
        and block.parts[0].coefficient == 1.0
        and scheme.fits(axis, block.parts[0].neurons, width)
    }
    if scheme.shared_along(axis):
        for _, numbers in blocks_by_owners(plan.table()):
            if not kept.issuperset(numbers):
                kept.difference_update(numbers)
    return kept


def number_format(
    checkpoint: Checkpoint, layers: dict[int, LayerPlan], *, refit: bool
) -> NumberFormat | None:
    """What plan and manifest say; ``None`` where all experts are plain numbers."""
    names: dict[str, None] = {}
    kept, rounded = dict.fromkeys(PROJECTIONS, 0), dict.fromkeys(PROJECTIONS, 0)
    for index, layer in sorted(layers.items()):
        schemes = checkpoint.expert_scheme(index)
        for projection, scheme, axis in zip(PROJECTIONS, schemes, _AXES, strict=True):
            if scheme.exact:
                continue
            names[scheme.name] = None
            again = refit and projection == "down"
            same = 0 if again else len(kept_blocks(layer, scheme, axis, checkpoint.shape.width))
            kept[projection] += same
            rounded[projection] += len(layer.blocks) - same
    if not names:
        return None
    return NumberFormat(
        schemes=tuple(names), tile=tile_width(checkpoint), kept=kept, requantised=rounded
    )
