"""Methods that merge whole experts, as published unless the options say otherwise.

In every one the original's statistics decide for all layers at once; where a source runs its
calibration texts again after each merged layer, that is said. Members of a group keep their router
rows: their weights add up on the merged expert, which is what a source does that lets the members
refer to one tensor.
"""

from __future__ import annotations

from typing import Final

import torch

from moe_serve.pruning.methods.alignment import (
    aligned_distances,
    by_correlation,
    by_distances,
    by_weights,
    keep_order,
)
from moe_serve.pruning.methods.grouping import (
    around_leaders,
    average_linkage,
    leaders_of,
    pseudo_pruning,
)
from moe_serve.pruning.methods.groups import best_experts
from moe_serve.pruning.methods.merging import Recipe, group_count, merge_groups
from moe_serve.pruning.methods.reservoir import Reservoir
from moe_serve.pruning.methods.similarity import (
    gated_similarity,
    gradient_cosine,
    linear_cka,
    logit_cosine,
    mean_output_distance,
    surrogate_cka,
)
from moe_serve.pruning.methods.view import Budget, LayerView
from moe_serve.pruning.plan import LayerPlan

_CKA: Final = Recipe(align=by_correlation, coefficients="frequency", drop_when_better=True)
_CKA_WEIGHTS: Final = Recipe(align=by_correlation, coefficients="uniform")
_HC: Final = Recipe(align=keep_order, coefficients="frequency")
_MSMOE: Final = Recipe(align=by_weights, coefficients="frequency", anchor="first")
_REAM: Final = Recipe(align=by_distances, coefficients="saliency", anchor="first", owners="anchor")
_WEIGHTS: Final = Recipe(align=by_weights, coefficients="uniform")
_GRADIENT: Final = Recipe(align=by_correlation, coefficients="frequency", drop_when_better=True)
_REAM_GROUP: Final = 16
"""C, as published."""


def merge_cka(view: LayerView, budget: Budget) -> LayerPlan:
    """Group experts whose outputs are alike, then merge or drop each group by measured error.

    Similarity is linear CKA of all experts' outputs on the same reservoir tokens; groups come
    from average linkage of 1 - CKA; a group is merged in weight space, weighted by how often each
    member was selected, or reduced to its most salient member, whichever leaves the layer's output
    on held-out tokens closer to the original's.

    Source: arXiv 2407.09590, section 3 (CKA, eq. 2-4; grouping; merging), data-centric. Ours: the
    neurons are aligned before they are averaged (after arXiv 2310.01334), the router
    rows stay, and merging has to beat dropping; ``--always-merge`` leaves the last out.
    """
    seen = Reservoir.of(view.mixture(), view.observed().reservoir_SD)
    part = seen.fitting() if _CKA.judges(budget) else seen
    similarity_NN = linear_cka(part.output_NSD)
    groups = average_linkage(1.0 - similarity_NN, group_count(view, budget, _CKA))
    why = {"similarity": _digits(similarity_NN)}
    return merge_groups(view, budget, _CKA, groups, mixture=seen.mixture, seen=seen, why=why)


def merge_cka_weights(view: LayerView, budget: Budget) -> LayerPlan:
    """Group experts whose weights are alike and merge each group evenly; needs no data.

    Similarity is linear CKA of the surrogate matrices W_down (W_gate ⊙ W_up); groups come from
    average linkage of 1 - CKA.

    Source: arXiv 2407.09590, section 3, model-centric. Ours: neurons are aligned by the cosine of
    their weights before they are averaged, and the router rows stay.
    """
    mixture = view.mixture()
    similarity_NN = surrogate_cka(mixture.units)
    groups = average_linkage(1.0 - similarity_NN, group_count(view, budget, _CKA_WEIGHTS))
    why = {"similarity": _digits(similarity_NN)}
    return merge_groups(view, budget, _CKA_WEIGHTS, groups, mixture=mixture, seen=None, why=why)


def merge_hc(view: LayerView, budget: Budget) -> LayerPlan:
    """Cluster the experts' mean outputs by average linkage; average each cluster by frequency.

    Source: HC-SMoE, arXiv 2410.08589, section 3, in the setting of its published scripts: mean
    output over all tokens, selected or not, Euclidean distance, average linkage, frequency-weighted
    merging without neuron alignment. Here the mean runs over the reservoir.
    """
    seen = Reservoir.of(view.mixture(), view.observed().reservoir_SD)
    distance_NN = mean_output_distance(seen.output_NSD)
    groups = average_linkage(distance_NN, group_count(view, budget, _HC))
    why = {"distance": _digits(distance_NN)}
    return merge_groups(view, budget, _HC, groups, mixture=seen.mixture, seen=seen, why=why)


def merge_msmoe(view: LayerView, budget: Budget) -> LayerPlan:
    """Gather experts around the most used by router logits; average them by frequency.

    Source: M-SMoE, arXiv 2310.01334, section 3: neurons aligned by weight matching (its code for
    Mixtral leaves this out), dominant experts by usage frequency, each other expert to the
    dominant one of most similar router logits, cosine over tokens, frequency-weighted average.
    The source chooses dominant experts over the whole model, at least one in each layer, and so
    does ``--across-layers``; with ``--each-layer`` every layer has the same number. Its code
    aligns a group to the member of lowest id; here it is the dominant expert.
    """
    statistics = view.observed()
    seen = Reservoir.of(view.mixture(), statistics.reservoir_SD)
    similarity_NN = logit_cosine(seen.logits())
    leaders = leaders_of(statistics.frequency(), group_count(view, budget, _MSMOE))
    groups = around_leaders(similarity_NN, leaders)
    why = {"similarity": _digits(similarity_NN)}
    return merge_groups(view, budget, _MSMOE, groups, mixture=seen.mixture, seen=seen, why=why)


def merge_ream(view: LayerView, budget: Budget) -> LayerPlan:
    """Merge the least salient experts into a few of the most salient.

    Source: REAM, arXiv 2604.04356, section 3, and its published code: REAP saliency; groups of at
    most C = 16 around the most salient in their order, by the mean of the similarities of gated
    outputs and of router logits; neurons aligned by the distances of activations and of weights;
    saliency-weighted average; router rows of the merged ones go. Its code weights the outputs by
    the gate once more inside the saliency, where the paper's (REAP's) formula stands here; and it
    runs the calibration texts again after each merged layer, where the original's inputs are used
    here (its ``--no_sequential``). Where the router ranks groups of experts, the most salient are
    those of :func:`best_experts`.
    """
    statistics = view.observed()
    seen = Reservoir.of(view.mixture(), statistics.reservoir_SD)
    similarity_NN = gated_similarity(seen.output_NSD, seen.logits())
    saliency_N = statistics.reap()
    rule = view.checkpoint.family.routing_of(view.checkpoint.config)
    best = best_experts(saliency_N.tolist(), group_count(view, budget, _REAM), rule)
    leaders = sorted(best, key=lambda e: (-float(saliency_N[e]), e))
    groups = pseudo_pruning(similarity_NN, leaders, _REAM_GROUP)
    why = {"similarity": _digits(similarity_NN)}
    return merge_groups(view, budget, _REAM, groups, mixture=seen.mixture, seen=seen, why=why)


def merge_weights(view: LayerView, budget: Budget) -> LayerPlan:
    """Group experts whose weights are near after neuron alignment; needs no data.

    Distance is min over P of ‖W_i - P W_j‖_F, gate, up and down together; groups come from
    average linkage; a group is averaged evenly, aligned to its first member.

    Source: weight matching of Git Re-Basin, arXiv 2209.04836, section 3.2, with the expert as the
    model. Cost: see :func:`aligned_distances`; the dry run says how long that is.
    """
    mixture = view.mixture()
    distance_NN = aligned_distances(mixture)
    groups = average_linkage(distance_NN, group_count(view, budget, _WEIGHTS))
    why = {"distance": _digits(distance_NN)}
    return merge_groups(view, budget, _WEIGHTS, groups, mixture=mixture, seen=None, why=why)


def merge_gradient(view: LayerView, budget: Budget) -> LayerPlan:
    """Group experts that the loss would change alike, then merge or drop by measured error.

    Similarity is the cosine of the loss's gradients with respect to the experts' maps from input
    to output, Σ_t w g zᵀ over the tokens each serves: unlike gradients of the weights it does not
    depend on the order of the neurons. Groups come from average linkage of 1 - cosine.

    Source: gradient cosine as one of the similarities in the code of arXiv 2310.01334, there of
    the flattened weights' gradients. Ours: the map, and what follows the grouping, as in
    :func:`merge_cka`.
    """
    seen = Reservoir.of(view.mixture(), view.observed().reservoir_SD)
    similarity_NN = gradient_cosine(view.gradients().map_NRR)
    groups = average_linkage(1.0 - similarity_NN, group_count(view, budget, _GRADIENT))
    why = {"similarity": _digits(similarity_NN)}
    return merge_groups(view, budget, _GRADIENT, groups, mixture=seen.mixture, seen=seen, why=why)


def _digits(matrix_NN: torch.Tensor) -> list[list[float]]:
    """Four digits of each: a plan of many layers of hundreds of experts stays readable."""
    return [[float(f"{x:.4g}") for x in row] for row in matrix_NN.tolist()]
