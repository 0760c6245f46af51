"""Bringing an expert's neurons into another's order before their weights are averaged.

A gated expert is the same function in any order of its neurons (gate rows, up rows and down
columns moved together), so each of these gives, for every neuron of an anchor, the neuron of
another expert that does its job. All are exact assignments (Hungarian algorithm, Kuhn 1955).

Shape suffixes: S tokens, I neurons per expert, D hidden size, K a neuron's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from scipy.optimize import linear_sum_assignment

from moe_serve.calibration.mixture import Mixture, Unit
from moe_serve.pruning.methods.similarity import cosine

Alignment: TypeAlias = Callable[[Mixture, torch.Tensor | None, int, int], list[int]]
"""(layer, tokens [S, D] where there are any, anchor, expert) → the expert's neurons in order."""


def keep_order(
    mixture: Mixture, _tokens: torch.Tensor | None, _anchor: int, expert: int
) -> list[int]:
    """No alignment: neuron i goes to neuron i."""
    return list(range(mixture.units[expert].width))


def by_weights(
    mixture: Mixture, _tokens: torch.Tensor | None, anchor: int, expert: int
) -> list[int]:
    """Least squared distance of the weights: the largest sum of their inner products.

    Source: Git Re-Basin, arXiv 2209.04836, section 3.2, as M-SMoE (arXiv 2310.01334, section 3)
    does it for one expert with both of its projections; here with all three.
    """
    return _assign(_rows(mixture.units[anchor]) @ _rows(mixture.units[expert]).T)


def by_correlation(
    mixture: Mixture, tokens: torch.Tensor | None, anchor: int, expert: int
) -> list[int]:
    """Correlation of the activations plus mean cosine of gate, up and down weights.

    Without tokens the cosine alone decides. Source: Li et al. 2015, arXiv 1511.07543, section 3,
    for activations.
    """
    a, b = mixture.units[anchor], mixture.units[expert]
    gain_II = cosine(_scaled_rows(a), _scaled_rows(b))
    if tokens is not None:
        gain_II = gain_II + _correlation(mixture.hidden(a, tokens), mixture.hidden(b, tokens))
    return _assign(gain_II)


def by_distances(
    mixture: Mixture, tokens: torch.Tensor | None, anchor: int, expert: int
) -> list[int]:
    """Distance of the activations plus distance of the weights, each scaled to norm one.

    Source: REAM, arXiv 2604.04356, section 3. Its code reduces the weights to 64 principal
    components first, for speed.
    """
    a, b = mixture.units[anchor], mixture.units[expert]
    normalize = torch.nn.functional.normalize
    cost_II = torch.cdist(normalize(_rows(a), dim=1), normalize(_rows(b), dim=1))
    if tokens is not None:
        h_IS, other_IS = (normalize(mixture.hidden(u, tokens).T, dim=1) for u in (a, b))
        cost_II = cost_II + torch.cdist(h_IS, other_IS)
    return _assign(-cost_II)


def aligned_distances(mixture: Mixture) -> torch.Tensor:
    """Distance of all pairs of experts' weights after alignment, min over P of ‖W_i - P W_j‖_F.

    Cost: N (N - 1) / 2 times 6 I² D for inner products and an assignment of I neurons.

    Returns:
        [N, N], FP64.
    """
    rows = [_rows(unit) for unit in mixture.units]
    distance_NN = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, a_IK in enumerate(rows):
        for j in range(i + 1, len(rows)):
            # Subtracted row by row: ‖a‖² + ‖b‖² - 2 a·b would cancel for near-equal experts.
            change_IK = a_IK - rows[j][_assign(a_IK @ rows[j].T)]
            square = change_IK.square().sum(dtype=torch.float64)
            distance_NN[i, j] = distance_NN[j, i] = square.sqrt()
    return distance_NN


def _assign(gain_II: torch.Tensor) -> list[int]:
    _, columns = linear_sum_assignment(gain_II.numpy(), maximize=True)
    return [int(c) for c in columns]


def _rows(unit: Unit) -> torch.Tensor:
    """One row per neuron: its gate, up and down weights."""
    return torch.cat([unit.gate_FD, unit.up_FD, unit.down_DF.T], dim=1)


def _scaled_rows(unit: Unit) -> torch.Tensor:
    """The same, each of the three scaled to norm one."""
    matrices = (unit.gate_FD, unit.up_FD, unit.down_DF.T)
    return torch.cat([torch.nn.functional.normalize(m, dim=1) for m in matrices], dim=1)


def _correlation(h_SI: torch.Tensor, other_SI: torch.Tensor) -> torch.Tensor:
    """Of all pairs of neurons [I, I]."""
    centred = [(h - h.mean(dim=0, keepdim=True)).T for h in (h_SI, other_SI)]
    return cosine(centred[0], centred[1])
