"""Experts cut into several of a stock model: each block gets a router row of its own.

Where f is the sum of g blocks, g experts with the same router row, g times as many selected, and
down projections g times as large are the same layer: their weights, which sum to one, are 1/g of
the original's each. So a stock model can hold blocks, and a layer can spend its neurons where they
count, as the compact format does. Once blocks are gone this is no longer exact: a token that
selects experts with fewer blocks gets some of the next expert's as well. The re-fit makes up for it
as for everything else, and a trial decides whether it pays.

Merged experts are the other case of a row for each block: there it stands for several.

Equal logits would leave the choice among an expert's blocks to the kernel. Rows of its later blocks
are therefore moved a little against the direction v in which inputs are most steady, z·v ≈ 1, so
that the block that matters most comes first.

Shape suffixes: S tokens, D hidden size, M blocks, b neurons of one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

import torch

from moe_serve.calibration.mixture import Mixture, Router, whole_experts
from moe_serve.checkpoint.form import LayerBlocks
from moe_serve.checkpoint.quantisation import Scheme
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.table import LayerTable
from moe_serve.errors import PlanError
from moe_serve.pruning.methods.neurons import Ladder
from moe_serve.pruning.plan import Block, LayerPlan, Part, Split

STEP: Final = 0.05
"""By how much the logits of an expert's next block are lower, where z·v is 1."""
_RIDGE: Final = 1e-3


def steady_direction(z_SD: torch.Tensor) -> torch.Tensor:
    """V [D], the least squares of z·v = 1 with a ridge, FP32."""
    used_SD = z_SD[z_SD.any(dim=1)].double()
    normal_DD = used_SD.T @ used_SD
    scale = normal_DD.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    normal_DD.diagonal().add_(_RIDGE * scale)
    solved_D1 = torch.cholesky_solve(used_SD.sum(dim=0)[:, None], torch.linalg.cholesky(normal_DD))
    return solved_D1[:, 0].float()


def split_plan(
    ladder: Ladder, block: int, counts: Sequence[int], top_k: int, direction_D: torch.Tensor
) -> LayerPlan:
    """The layer when expert e keeps ``counts[e]`` blocks, each selected on its own.

    The neurons that stay longest form an expert's first block, and so on.
    """
    planned = ladder.plan(block, list(counts))
    blocks = []
    for expert, count in enumerate(counts):
        order = ladder.path.kept(expert, count * block)
        for first in range(0, count * block, block):
            neurons = tuple(sorted(order[first : first + block]))
            blocks.append(Block(parts=(Part(expert=expert, neurons=neurons),)))
    split = Split(top_k=top_k, step=STEP, direction=tuple(direction_D.tolist()))
    return planned.model_copy(update={"blocks": tuple(blocks), "split": split})


def one_row_each(checkpoint: Checkpoint, layers: dict[int, LayerPlan]) -> dict[int, LayerPlan]:
    """Plans of merged experts for stock software: one router row for each.

    Raises:
        PlanError: the router has a correction bias or ranks groups, or selects more than stay.
    """
    rule = checkpoint.family.routing_of(checkpoint.config)
    if all(len(owned) == 1 for p in layers.values() for owned in p.table().owners()):
        return layers
    if checkpoint.family.correction_bias is not None or rule.groups > 1:
        raise PlanError(
            "experts share blocks, and a router with a correction bias or groups can't be given "
            "one row for several",
            where="--format native",
            remedy="use --format compact, or a method that drops",
        )
    fewest = min(len(p.blocks) for p in layers.values())
    if fewest < rule.top_k:
        raise PlanError(
            f"{fewest} experts would stay in a layer, the router selects {rule.top_k}",
            where="--format native",
            remedy="keep more, or use --format compact",
        )
    split = Split(top_k=rule.top_k)
    return {index: p.model_copy(update={"split": split}) for index, p in layers.items()}


def split_layer(
    original: Mixture,
    planned: LayerPlan,
    blocks: LayerBlocks,
    scheme: Scheme,
    dtype: torch.dtype,
) -> tuple[Mixture, LayerBlocks, LayerTable]:
    """The layer as a stock one of M experts.

    Args:
        original: its router and experts.
        planned: which blocks there are and how they are selected.
        blocks: their weights.
        scheme: of the down projections.
        dtype: number format of the router's rows.

    Returns:
        The original with the new router, the blocks with scaled down projections, and the table of
        a stock layer.
    """
    split = planned.split
    if split is None:
        raise ValueError("the plan cuts no experts")
    owners = [owned[0] for owned in planned.table().owners()]
    router = split_router(original.router, planned, split, dtype)
    rank_M = ranks(planned)
    scales = [_scale(original.router, len(owners), split, float(rank)) for rank in rank_M.tolist()]
    down = [
        scheme.quantise(scheme.dequantise(matrix) * scale)
        for matrix, scale in zip(blocks.down, scales, strict=True)
    ]
    table = whole_experts(len(owners), planned.width)
    return dataclasses.replace(original, router=router), blocks._replace(down=down), table


def split_router(router: Router, planned: LayerPlan, split: Split, dtype: torch.dtype) -> Router:
    """A row for each block: its expert's, those of later blocks moved; of several, their mean."""
    owners = planned.table().owners()
    rows_MD = torch.stack([router.weight_ND[list(owned)].mean(dim=0) for owned in owners])
    if not split.merges:
        direction_D = torch.tensor(split.direction, device=rows_MD.device)
        rows_MD -= split.step * ranks(planned).to(rows_MD.device)[:, None] * direction_D
    first = [owned[0] for owned in owners]
    return Router(
        weight_ND=rows_MD.to(dtype).float(),
        rule=dataclasses.replace(router.rule, top_k=split.top_k),
        bias_N=router.bias_N[first] if router.bias_N is not None else None,
    )


def ranks(planned: LayerPlan) -> torch.Tensor:
    """Each block's place among those of its expert [M], FP32; 0 is the one that matters most."""
    rank_M = torch.zeros(len(planned.blocks))
    for listed in planned.experts:
        for rank, block in enumerate(listed or ()):
            rank_M[block] = rank
    return rank_M


def _scale(router: Router, blocks: int, split: Split, rank: float) -> float:
    """What the router's weight of a block loses against its expert's, roughly."""
    rule = router.rule
    if split.merges:
        return 1.0
    moved = math.exp(split.step * rank) if rule.score == "softmax" else 1.0
    if rule.renormalise:
        return moved * split.top_k / rule.top_k
    return moved * blocks / len(router.weight_ND) if rule.score == "softmax" else 1.0
