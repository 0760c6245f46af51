"""Methods that choose neurons, grouped into blocks."""

from __future__ import annotations

import numpy as np
import torch

from moe_serve.errors import PlanError
from moe_serve.pruning.allocation import allocate
from moe_serve.pruning.obs import RemovalPath, removal_path
from moe_serve.pruning.plan import Block, LayerPlan, copies
from moe_serve.pruning.view import Budget, LayerView


def block_obs(view: LayerView, budget: Budget) -> LayerPlan:
    """Keep the neurons whose removal the others cannot make up for.

    Each expert's neurons are ordered by optimal brain surgeon under re-fitting; blocks are handed
    out within the layer so that the summed error is least.

    Source: Hassibi & Stork 1993, eq. 5, with the output-error Hessian of arXiv 2301.00774, eq. 2;
    neurons as the unit after HEAPr, arXiv 2509.22299.
    """
    statistics = view.observed()
    path = removal_path(statistics.normal_NII, view.projection(2))
    scores = {
        "reap": statistics.reap().tolist(),
        "frequency": statistics.frequency().tolist(),
    }
    return _from_path(path, view, budget, scores)


def block_magnitude(view: LayerView, budget: Budget) -> LayerPlan:
    """Keep the neurons with the largest product of norms ‖g‖·‖u‖·‖d‖; needs no data.

    The product is invariant under the rescalings that leave a gated neuron's function unchanged
    up to its activation: up by a factor and down by its inverse.
    """
    gate_NID, up_NID, down_NDI = (view.projection(i) for i in range(3))
    product_NI = gate_NID.norm(dim=2) * up_NID.norm(dim=2) * down_NDI.norm(dim=1)
    value_NI, order_NI = product_NI.double().square().sort(dim=1)
    path = RemovalPath(order_NI=order_NI, error_NI=value_NI.cumsum(dim=1))
    return _from_path(path, view, budget, {})


def _from_path(
    path: RemovalPath, view: LayerView, budget: Budget, scores: dict[str, list[float]]
) -> LayerPlan:
    shape, width = view.shape, budget.block_width
    most = shape.width // width
    error_NR = torch.stack([path.error_at(count * width) for count in range(most + 1)], dim=1)
    total = budget.blocks(shape)
    if total < 1:
        raise PlanError(
            f"keep={budget.keep:g} leaves no block of {width} neurons in layer {view.index}",
            remedy="keep more, or use narrower blocks with --block-width",
        )
    if budget.uniform:
        counts = _even(total, shape.experts, view.index)
    else:
        counts = allocate(error_NR.numpy(), min(total, most * shape.experts))
    blocks: list[Block] = []
    experts: list[tuple[int, ...]] = []
    for expert, count in enumerate(counts):
        new = copies(expert, path.kept(expert, count * width), width)
        experts.append(tuple(range(len(blocks), len(blocks) + len(new))))
        blocks += new
    full = error_NR[:, 0].clamp(min=torch.finfo(torch.float64).tiny)
    chosen = error_NR[np.arange(shape.experts), counts]
    why = {
        "neurons_kept": [count * width for count in counts],
        "error_added": chosen.tolist(),
        "error_if_dropped": error_NR[:, 0].tolist(),
        "share_of_output_lost": (chosen / full).tolist(),
        "scores": scores,
    }
    return LayerPlan(width=width, blocks=tuple(blocks), experts=tuple(experts), why=why)


def _even(total: int, experts: int, layer: int) -> list[int]:
    each = total // experts
    if each < 1:
        raise PlanError(
            f"layer {layer}: one block for each of {experts} experts is more than the budget",
            remedy="keep more, use narrower blocks, or choose --format compact",
        )
    return [each] * experts
