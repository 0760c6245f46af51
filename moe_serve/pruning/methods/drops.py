"""Methods that drop whole experts: the rest stay as they are, the router chooses among them."""

from __future__ import annotations

import torch

from moe_serve.errors import PlanError
from moe_serve.pruning.methods.groups import best_experts
from moe_serve.pruning.methods.neurons import loss_root
from moe_serve.pruning.methods.view import Budget, LayerView
from moe_serve.pruning.plan import Block, LayerPlan, Part


def drop_reap(view: LayerView, budget: Budget) -> LayerPlan:
    """Drop the experts with the least mean routed output norm.

    Source: REAP, arXiv 2510.13999, eq. 5: S_j = mean over tokens routed to j of g_j‖f_j‖, g_j as
    the family normalises it (as its code does by default).
    """
    saliency_N = view.observed().reap()
    return keep_best(view, saliency_N, budget, {"reap": saliency_N.tolist()})


def drop_frequency(view: LayerView, budget: Budget) -> LayerPlan:
    """Drop the experts that were selected least (M-SMoE's usage count, arXiv 2310.01334)."""
    frequency_N = view.observed().frequency()
    return keep_best(view, frequency_N, budget, {"frequency": frequency_N.tolist()})


def drop_seer(view: LayerView, budget: Budget) -> LayerPlan:
    """Drop the experts with the least summed router weight.

    Source: SEER-MoE, arXiv 2404.05089, section 3.1, soft heavy-hitters counting. Here over the
    tokens that selected the expert, g as the family normalises it, and in each layer alike.
    """
    weight_N = view.observed().weight_CN.sum(dim=0)
    return keep_best(view, weight_N, budget, {"seer": weight_N.tolist()})


def drop_ean(view: LayerView, budget: Budget) -> LayerPlan:
    """Drop the experts with the least summed output norm over the tokens that selected them.

    Source: expert activation norm, arXiv 2504.05586, as REAP's baseline (arXiv 2510.13999).
    """
    norm_N = view.observed().norm_CN.sum(dim=0)
    return keep_best(view, norm_N, budget, {"ean": norm_N.tolist()})


def drop_man(view: LayerView, budget: Budget) -> LayerPlan:
    """Drop the experts with the least mean output norm over the tokens that selected them.

    Source: mean activation norm, arXiv 2606.15716.
    """
    statistics = view.observed()
    mean_N = statistics.norm_CN.sum(dim=0) / statistics.count_CN.sum(dim=0).clamp(min=1)
    return keep_best(view, mean_N, budget, {"man": mean_N.tolist()})


def drop_msan(view: LayerView, budget: Budget) -> LayerPlan:
    """Drop the experts with the least mean squared output norm over their tokens.

    Source: mean squared activation norm, arXiv 2606.15716.
    """
    statistics = view.observed()
    mean_N = statistics.square_CN.sum(dim=0) / statistics.count_CN.sum(dim=0).clamp(min=1)
    return keep_best(view, mean_N, budget, {"msan": mean_N.tolist()})


def drop_taylor(view: LayerView, budget: Budget) -> LayerPlan:
    """Drop the experts whose outputs move the loss least to first order, E|w f·∂L/∂y|.

    Source: Molchanov et al. 2017, arXiv 1611.06440, eq. 7, with the expert as the unit: the
    absolute change of the loss, token by token, when the routed output is set to zero.
    """
    effect_N = view.gradients().taylor_N
    return keep_best(view, effect_N, budget, {"taylor": effect_N.tolist()})


def drop_fisher(view: LayerView, budget: Budget) -> LayerPlan:
    """Drop the experts with the least Fisher importance, E(w f·∂L/∂y)².

    Source: Theis et al. 2018, arXiv 1801.05787, eq. 8, with the expert as the unit.
    """
    effect_N = view.gradients().fisher_N
    return keep_best(view, effect_N, budget, {"fisher": effect_N.tolist()})


def drop_aimer(view: LayerView, budget: Budget) -> LayerPlan:
    """Drop the experts whose weights are spread most evenly; needs no data.

    Source: AIMER, arXiv 2603.18492: the mean absolute weight over the root mean square of all
    three projections together; the highest go first.
    """
    totals = torch.zeros(3, view.shape.experts, dtype=torch.float64)
    for which in range(3):
        flat_NW = view.projection(which).flatten(1)
        totals[0] += flat_NW.abs().sum(dim=1)
        totals[1] += flat_NW.square().sum(dim=1)
        totals[2] += flat_NW.shape[1]
    absolute_N, square_N, count_N = totals
    tiny = torch.finfo(torch.float64).tiny
    score_N = (absolute_N / count_N) / (square_N / count_N).clamp(min=tiny).sqrt()
    return keep_best(view, -score_N, budget, {"aimer": score_N.tolist()})


def drop_constant(view: LayerView, budget: Budget) -> LayerPlan:
    """Drop the experts that a constant stands for best; made for ``--format substitution``.

    With w the router's weight, the constant c = E[w² f] / E[w²] minimises E‖w f - w c‖², and what
    is left is E[w² fᵀ M f] - E[w²] cᵀ M c in the loss's metric M = E[g gᵀ]. That compares over
    layers: each keeps as many as it has among the model's best, one at least.

    Source: constants for experts after MoNE, arXiv 2507.00390, which ranks by the variance of
    outputs and by frequency; the weighting and the metric are ours.
    """
    left_N = constant_error(view)
    return keep_best(view, left_N, budget, {"error_of_constant": left_N.tolist()})


def constant_error(view: LayerView) -> torch.Tensor:
    """What the best constant in place of each expert costs in the loss's metric [N], FP64."""
    statistics, root_DD = view.observed(), loss_root(view.gradients())
    down_NDI = torch.einsum("de,ndi->nei", root_DD, view.projection(2))
    square_NII = down_NDI.transpose(1, 2) @ down_NDI
    total_N = (statistics.normal_NII * square_NII).sum(dim=(1, 2), dtype=torch.float64)
    tiny = torch.finfo(torch.float64).tiny
    mean_ND = (statistics.routed_ND @ root_DD).double()
    explained_N = mean_ND.square().sum(dim=1) / statistics.routed_N.clamp(min=tiny)
    return (total_N - explained_N).clamp(min=0.0) / statistics.weight


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
    if budget.constants:
        # The router still finds every expert, so whatever rule it selects by stays sound.
        order = torch.argsort(saliency_N, descending=True, stable=True)
        return whole(view, sorted(order[:count].tolist()), scores)
    rule = view.checkpoint.family.routing_of(view.checkpoint.config)
    kept = best_experts(saliency_N.tolist(), count, rule)
    return whole(view, kept, scores)


def checked_count(view: LayerView, budget: Budget) -> int:
    """Whole experts a layer keeps.

    Raises:
        PlanError: fewer would stay than the router selects, or more than there are.
    """
    shape = view.shape
    count = budget.whole_experts(shape)
    if budget.constants and count >= 1:
        return min(count, shape.experts)
    if count < shape.top_k:
        raise PlanError(
            f"{count} experts would stay in each layer, the router selects {shape.top_k}",
            remedy=f"keep at least {shape.top_k} of {shape.experts}, "
            "or choose a block method, which has no such limit",
            where="--keep, --experts",
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
