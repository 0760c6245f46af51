"""Methods that drop whole experts: the rest stay as they are, the router chooses among them."""

from __future__ import annotations

import torch

from moe_serve.errors import PlanError
from moe_serve.pruning.plan import Block, LayerPlan, Part
from moe_serve.pruning.view import Budget, LayerView


def drop_reap(view: LayerView, budget: Budget) -> LayerPlan:
    """Drop the experts with the least mean routed output norm.

    Source: REAP, arXiv 2510.13999, eq. 5: S_j = mean over tokens routed to j of g_j‖f_j‖.
    """
    saliency_N = view.observed().reap()
    return keep_best(view, saliency_N, budget, {"reap": saliency_N.tolist()})


def drop_frequency(view: LayerView, budget: Budget) -> LayerPlan:
    """Drop the experts that were selected least (M-SMoE's usage count, arXiv 2310.01334)."""
    frequency_N = view.observed().frequency()
    return keep_best(view, frequency_N, budget, {"frequency": frequency_N.tolist()})


def drop_random(view: LayerView, budget: Budget) -> LayerPlan:
    """Drop experts by lot: what any rule has to beat."""
    generator = torch.Generator().manual_seed(1_000_003 * budget.seed + view.index)
    return keep_best(view, torch.rand(view.shape.experts, generator=generator), budget, {})


def keep_best(
    view: LayerView, saliency_N: torch.Tensor, budget: Budget, scores: dict[str, list[float]]
) -> LayerPlan:
    """Keep the budget's number of experts with the highest saliency; ties to the lower id.

    Raises:
        PlanError: fewer would stay than the router selects.
    """
    count = checked_count(view, budget)
    order = torch.argsort(saliency_N, descending=True, stable=True)
    return whole(view, sorted(order[:count].tolist()), scores)


def checked_count(view: LayerView, budget: Budget) -> int:
    """Whole experts a layer keeps.

    Raises:
        PlanError: fewer would stay than the router selects, or more than there are.
    """
    shape = view.shape
    count = budget.whole_experts(shape)
    if count < shape.top_k:
        raise PlanError(
            f"{count} experts would stay in each layer, the router selects {shape.top_k}",
            remedy=f"keep at least {shape.top_k} of {shape.experts}, "
            "or choose a block method, which has no such limit",
        )
    return min(count, shape.experts)


def whole(view: LayerView, kept: list[int], scores: dict[str, list[float]]) -> LayerPlan:
    """A plan that keeps some experts whole and drops the others."""
    shape = view.shape
    every = tuple(range(shape.width))
    place = {expert: number for number, expert in enumerate(kept)}
    return LayerPlan(
        width=shape.width,
        blocks=tuple(Block(parts=(Part(expert=e, neurons=every),)) for e in kept),
        experts=tuple((place[e],) if e in place else None for e in range(shape.experts)),
        why={
            "neurons_kept": [shape.width if e in place else 0 for e in range(shape.experts)],
            "scores": scores,
        },
    )
