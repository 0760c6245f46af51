"""Which experts belong together, from how alike they are.

Shape suffixes: N experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

from moe_serve.errors import PlanError


def average_linkage(distance_NN: torch.Tensor, count: int) -> list[list[int]]:
    """Join the two groups of least mean distance between members until ``count`` are left.

    Source: Sokal & Michener 1958 (UPGMA); HC-SMoE, arXiv 2410.08589, section 3.
    """
    experts = len(distance_NN)
    if count >= experts:
        return [[e] for e in range(experts)]
    distance = distance_NN.double().clamp(min=0.0).numpy().copy()
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform((distance + distance.T) / 2, checks=False), method="average")
    labels = cut_tree(tree, n_clusters=count).ravel()
    return [np.flatnonzero(labels == label).tolist() for label in dict.fromkeys(labels.tolist())]


def around_leaders(similarity_NN: torch.Tensor, leaders: Sequence[int]) -> list[list[int]]:
    """Each other expert joins the leader it is most like; a group's leader comes first.

    Source: M-SMoE, arXiv 2310.01334, section 3.
    """
    groups = {leader: [leader] for leader in leaders}
    for expert in range(len(similarity_NN)):
        if expert not in groups:
            nearest = max(leaders, key=lambda c: (float(similarity_NN[expert, c]), -c))
            groups[nearest].append(expert)
    return list(groups.values())


def pseudo_pruning(
    similarity_NN: torch.Tensor, leaders: Sequence[int], size: int
) -> list[list[int]]:
    """Leaders take their turn; each takes the experts most like it that are left, ``size`` in all.

    So a few leaders take in all the others, and most stay as they are. A group's leader comes
    first. Source: REAM, arXiv 2604.04356, section 3.

    Args:
        similarity_NN: how alike two experts are.
        leaders: the most salient first.
        size: C, the most members of a group.

    Raises:
        PlanError: the leaders have no room for all.
    """
    experts = len(similarity_NN)
    if len(leaders) * size < experts:
        raise PlanError(
            f"{len(leaders)} groups of at most {size} experts do not hold {experts}",
            remedy="keep more experts",
            where="--keep, --experts",
        )
    left = [e for e in range(experts) if e not in set(leaders)]
    groups = []
    for leader in leaders:
        left.sort(key=lambda e: (-float(similarity_NN[leader, e]), e))
        groups.append([leader, *left[: size - 1]])
        left = left[size - 1 :]
    return groups


def leaders_of(score_N: torch.Tensor, count: int) -> list[int]:
    """The ``count`` experts of highest score, the highest first; ties to the lower id."""
    return [int(e) for e in torch.argsort(score_N, descending=True, stable=True)[:count]]


def counts_over_layers(
    score_of: Mapping[int, torch.Tensor], total: int, *, least: int = 1
) -> dict[int, int]:
    """How many of the ``total`` best experts of the whole model lie in each layer.

    Every layer's ``least`` best count in any case. Ties go to the earlier layer and lower id.

    Source: M-SMoE, arXiv 2310.01334, section 3 and its code: dominant experts are chosen
    over the model, at least one in each layer.

    Raises:
        PlanError: ``total`` is less than ``least`` for each layer.
    """
    if total < least * len(score_of):
        raise PlanError(
            f"{total} experts in {len(score_of)} layers are fewer than {least} in each",
            remedy="keep more experts",
            where="--keep, --experts",
        )
    ranked = []
    for layer, score_N in sorted(score_of.items()):
        best = leaders_of(score_N, len(score_N))
        ranked += [
            (rank >= least, -float(score_N[expert]), layer, expert)
            for rank, expert in enumerate(best)
        ]
    counts = dict.fromkeys(score_of, 0)
    for _, _, layer, _ in sorted(ranked)[:total]:
        counts[layer] += 1
    return counts
