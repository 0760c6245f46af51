"""Merging experts that do the same job (arXiv 2407.09590, data-centric).

Shape suffixes: S reservoir tokens, N experts, I neurons, D hidden size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform

from moe_serve.calibration.mixture import Mixture, Router, Unit
from moe_serve.pruning.drops import checked_count
from moe_serve.pruning.plan import Block, LayerPlan, Part
from moe_serve.pruning.similarity import linear_cka
from moe_serve.pruning.view import Budget, LayerView


def merge_cka(view: LayerView, budget: Budget) -> LayerPlan:
    """Group experts whose outputs are alike, then merge or drop each group by measured error.

    Similarity is linear CKA of all experts' outputs on the same reservoir tokens; groups come
    from average linkage; a group is merged in weight space after neuron alignment, weighted by
    how often each member was selected, or reduced to its most salient member, whichever leaves
    the layer's output closer to the original's on the reservoir.

    Source: arXiv 2407.09590, section 3 (CKA, eq. 2-4; grouping; merging); alignment before
    averaging after arXiv 2310.01334, section 3.1.
    """
    statistics = view.observed()
    count = checked_count(view, budget)
    mixture = view.mixture()
    seen = _Reservoir.of(mixture, statistics.reservoir_SD)
    similarity_NN = linear_cka(seen.output_NSD)
    groups = average_linkage(similarity_NN, count)
    frequency_N = statistics.frequency().clamp(min=1e-12)
    saliency_N = statistics.reap()
    blocks: list[Block] = []
    experts: list[tuple[int, ...] | None] = [None] * view.shape.experts
    decisions = []
    for group in groups:
        merged = merge_parts(mixture, seen, group, frequency_N)
        best = max(group, key=lambda e: (float(saliency_N[e]), -e))
        errors = {
            "merge": seen.merge_error(mixture, group, merged),
            "drop": seen.drop_error(mixture.router, [e for e in group if e != best]),
        }
        keep_merge = len(group) > 1 and errors["merge"] < errors["drop"]
        for expert in group if keep_merge else (best,):
            experts[expert] = (len(blocks),)
        alone = Block(parts=(Part(expert=best, neurons=tuple(range(view.shape.width))),))
        blocks.append(merged if keep_merge else alone)
        if len(group) > 1:
            chosen = "merge" if keep_merge else "drop"
            decisions.append({"members": group, "chosen": chosen, "kept": best, "error": errors})
    why = {
        "neurons_kept": [0 if b is None else view.shape.width for b in experts],
        "similarity": similarity_NN.tolist(),
        "groups": decisions,
        "scores": {"reap": saliency_N.tolist(), "frequency": frequency_N.tolist()},
    }
    return LayerPlan(width=view.shape.width, blocks=tuple(blocks), experts=tuple(experts), why=why)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reservoir:
    """All experts on the same tokens."""

    z_SD: torch.Tensor
    hidden_NSI: tuple[torch.Tensor, ...]
    output_NSD: torch.Tensor
    weights_SN: torch.Tensor
    logits_SN: torch.Tensor

    @classmethod
    def of(cls, mixture: Mixture, z_SD: torch.Tensor) -> _Reservoir:
        hidden = tuple(mixture.hidden(unit, z_SD) for unit in mixture.units)
        outputs = [h @ u.down_DF.T for h, u in zip(hidden, mixture.units, strict=True)]
        return cls(
            z_SD=z_SD,
            hidden_NSI=hidden,
            output_NSD=torch.stack(outputs),
            weights_SN=mixture.router(z_SD),
            logits_SN=mixture.router.logits(z_SD),
        )

    def drop_error(self, router: Router, dropped: list[int]) -> float:
        """Mean squared change of the layer's output when ``dropped`` can't be selected."""
        fewer = dataclasses.replace(router, dropped=tuple(dropped))
        change_SN = fewer(self.z_SD) - self.weights_SN
        change_SD = torch.einsum("sn,nsd->sd", change_SN, self.output_NSD)
        return float(change_SD.square().sum(dim=1).mean())

    def merge_error(self, mixture: Mixture, group: list[int], block: Block) -> float:
        """Mean squared change of the layer's output when ``group`` shares one merged expert."""
        merged = merged_unit(mixture, block, tuple(group))
        f_SD = mixture.hidden(merged, self.z_SD) @ merged.down_DF.T
        weights_SG = self.weights_SN[:, group]
        original_SD = torch.einsum("sg,gsd->sd", weights_SG, self.output_NSD[group])
        change_SD = weights_SG.sum(dim=1, keepdim=True) * f_SD - original_SD
        return float(change_SD.square().sum(dim=1).mean())


def average_linkage(similarity_NN: torch.Tensor, count: int) -> list[list[int]]:
    """Cut an average-linkage tree of 1 - similarity into ``count`` groups."""
    experts = len(similarity_NN)
    if count >= experts:
        return [[e] for e in range(experts)]
    distance = (1.0 - similarity_NN.double()).clamp(min=0.0).numpy().copy()
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform((distance + distance.T) / 2, checks=False), method="average")
    labels = cut_tree(tree, n_clusters=count).ravel()
    return [np.flatnonzero(labels == label).tolist() for label in dict.fromkeys(labels.tolist())]


def merge_parts(
    mixture: Mixture, seen: _Reservoir, group: list[int], mass_N: torch.Tensor
) -> Block:
    """A block that averages a group's experts, neurons aligned, weighted by ``mass_N``.

    Neurons are matched to those of the heaviest member by Hungarian assignment on the
    correlation of their activations plus the cosine of their weights.
    """
    anchor = max(group, key=lambda e: (float(mass_N[e]), -e))
    share_N = mass_N / mass_N[group].sum()
    parts = []
    for expert in group:
        if expert == anchor:
            neurons = list(range(mixture.units[anchor].width))
        else:
            neurons = _aligned(mixture.units, seen.hidden_NSI, anchor, expert)
        parts.append(
            Part(expert=expert, neurons=tuple(neurons), coefficient=float(share_N[expert]))
        )
    return Block(parts=tuple(parts))


def _aligned(
    units: tuple[Unit, ...], hidden: tuple[torch.Tensor, ...], anchor: int, expert: int
) -> list[int]:
    """For each neuron of ``anchor``, the neuron of ``expert`` that does its job."""
    gain = _correlation(hidden[anchor].T, hidden[expert].T)
    gain += _cosine(_rows(units[anchor]), _rows(units[expert]))
    _, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    return [int(c) for c in columns]


def _rows(unit: Unit) -> torch.Tensor:
    """One row per neuron: its gate, up and down weights, each scaled to norm one."""
    matrices = (unit.gate_FD, unit.up_FD, unit.down_DF.T)
    return torch.cat([torch.nn.functional.normalize(m, dim=1) for m in matrices], dim=1)


def _correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _cosine(a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True))


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    normalize = torch.nn.functional.normalize
    return normalize(a, dim=1) @ normalize(b, dim=1).T


def merged_unit(mixture: Mixture, block: Block, owners: tuple[int, ...]) -> Unit:
    """The weights a block describes, from units that are whole experts, FP32."""
    gate, up, down = (
        sum_parts(block, [tensor(u) for u in mixture.units], rows=rows)
        for tensor, rows in (
            (lambda u: u.gate_FD, True),
            (lambda u: u.up_FD, True),
            (lambda u: u.down_DF, False),
        )
    )
    return Unit(owners=owners, gate_FD=gate, up_FD=up, down_DF=down)


def sum_parts(block: Block, weights: list[torch.Tensor], *, rows: bool) -> torch.Tensor:
    """Σ coefficient · weight[neurons]; a single part with coefficient one is an exact copy.

    Args:
        block: which neurons of which experts.
        weights: one matrix per original expert.
        rows: whether neurons are rows (gate, up) or columns (down).
    """
    total: torch.Tensor | None = None
    for part in block.parts:
        index = torch.tensor(part.neurons)
        taken = weights[part.expert].index_select(0 if rows else 1, index)
        if part.coefficient != 1.0:
            taken = taken * part.coefficient
        total = taken if total is None else total + taken
    if total is None:
        raise ValueError("a block has at least one part")
    return total
