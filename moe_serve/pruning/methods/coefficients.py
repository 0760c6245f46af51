"""How much each member of a group counts in its merged expert.

Shape suffixes: G members of a group, S tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import torch
from scipy.optimize import nnls

from moe_serve.calibration.statistics import LayerStatistics
from moe_serve.errors import UsageError
from moe_serve.pruning.methods.reservoir import Reservoir

_CHUNK: Final = 256
"""Tokens in FP64 at once."""
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What coefficients may rest on; ``None`` without calibration texts."""

    statistics: LayerStatistics | None
    reservoir: Reservoir | None


def uniform(members: Sequence[int], _evidence: Evidence) -> torch.Tensor:
    """All the same (model soups, arXiv 2203.05482)."""
    return torch.full((len(members),), 1 / len(members), dtype=torch.float64)


def frequency(members: Sequence[int], evidence: Evidence) -> torch.Tensor:
    """By how often each was selected (M-SMoE, arXiv 2310.01334, section 3)."""
    return _shares(_seen(evidence.statistics).frequency()[list(members)])


def saliency(members: Sequence[int], evidence: Evidence) -> torch.Tensor:
    """By REAP saliency; one of zero counts as the layer's least above zero (arXiv 2604.04356)."""
    saliency_N = _seen(evidence.statistics).reap()
    positive = saliency_N[saliency_N > 0]
    least = float(positive.min()) if len(positive) else 1.0
    return _shares(torch.where(saliency_N > 0, saliency_N, least)[list(members)])


def least_squares(members: Sequence[int], evidence: Evidence) -> torch.Tensor:
    """The c ≥ 0, Σ c = 1 that minimises E‖Σ_j g_j f_j - (Σ_j g_j) Σ_j c_j f_j‖².

    To first order in the members' differences the average of aligned weights puts out the average
    of the outputs, which makes the group's output error a quadratic in c: with r_j = Σ_k g_k f_k -
    (Σ g) f_j it is cᵀ M c, M = E[r_j · r_k]. Its minimum is the point of the r_j's convex hull
    nearest to zero, found exactly by non-negative least squares: if x ≥ 0 minimises
    xᵀ M x + (1 - Σ x)², then c = x / Σ x (Lawson & Hanson 1974, chapter 23).
    """
    seen = _seen(evidence.reservoir)
    index = list(members)
    moment_GG = torch.zeros(len(index), len(index), dtype=torch.float64)
    goal = 0.0
    for start in range(0, len(seen.z_SD), _CHUNK):
        rows = slice(start, start + _CHUNK)
        weight_SG = seen.weights_SN[rows, index].double()
        output_GSD = seen.output_NSD[index, rows].double()
        goal_SD = torch.einsum("sg,gsd->sd", weight_SG, output_GSD)
        residual = (goal_SD - weight_SG.sum(dim=1, keepdim=True) * output_GSD).flatten(1)
        moment_GG += residual @ residual.T
        goal += float(goal_SD.square().sum())
    scale = float(moment_GG.diagonal().mean())
    # FP32 outputs of equal experts in different neuron order differ by rounding alone.
    if scale <= torch.finfo(torch.float32).eps ** 2 * goal:
        return uniform(members, evidence)  # The members do the same, or no token chose them.
    values_G, vectors_GG = torch.linalg.eigh(moment_GG / scale)
    root_GG = values_G.clamp(min=0).sqrt()[:, None] * vectors_GG.T
    system = np.vstack([root_GG.numpy(), np.ones((1, len(index)))])
    x_G, _ = nnls(system, np.eye(len(index) + 1)[-1])
    return _shares(torch.from_numpy(x_G))


Coefficients = Callable[[Sequence[int], Evidence], torch.Tensor]
"""(members, evidence) → [G] in FP64, not negative, summing to one."""

COEFFICIENTS: Final[dict[str, Coefficients]] = {
    "uniform": uniform,
    "frequency": frequency,
    "saliency": saliency,
    "qp": least_squares,
}


def coefficients_named(name: str, *, texts: bool) -> Coefficients:
    """Find a rule.

    Raises:
        UsageError: there is none of this name, or it needs texts and there are none.
    """
    if name not in COEFFICIENTS:
        raise UsageError(
            f"no coefficients {name!r}",
            where="--coefficients",
            remedy="choose from " + ", ".join(COEFFICIENTS),
        )
    if name != "uniform" and not texts:
        raise UsageError(
            f"{name} needs calibration texts",
            where="--coefficients",
            remedy="give --calibration PATH, or --coefficients uniform",
        )
    return COEFFICIENTS[name]


def _shares(value_G: torch.Tensor) -> torch.Tensor:
    """Scaled to sum to one; all the same where all are zero."""
    value_G = value_G.double().clamp(min=0)
    total = float(value_G.sum())
    if total <= 0:
        return torch.full_like(value_G, 1 / len(value_G))
    return value_G / total


def _seen(found: _T | None) -> _T:
    if found is None:
        raise UsageError(
            "these coefficients need calibration texts",
            where="--coefficients",
            remedy="give --calibration PATH, or --coefficients uniform",
        )
    return found
