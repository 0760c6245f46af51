"""Optimal brain surgeon under re-fitting: the order in which an expert's neurons can go.

An expert's output is P W with P its routed, weighted neurons [T, I] and W = W_downᵀ [I, D].
Removing the set S and re-fitting the rest by least squares adds the squared error
tr(W_Sᵀ ((H⁻¹)_SS)⁻¹ W_S), H = PᵀP + λI (Hassibi & Stork 1993, eq. 5, for a group of weights;
Frantar & Alistarh 2023, arXiv 2301.00774, eq. 2). Neurons go in rounds, each time those that add
least, with H⁻¹ and W downdated after each round; up to a width of 192 a round is one neuron.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

_FP64_WIDTH: Final = 1024
"""Wider experts are handled in FP32: half the memory, and λ bounds the condition number."""
ROUNDS: Final = 192
"""Wider experts lose several neurons a round: the cost is I³ instead of I³ times I / 192."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemovalPath:
    """For each of N experts, the order of removal and what it costs."""

    order_NI: torch.Tensor
    """Neuron removed first, second, … (I64)."""
    error_NI: torch.Tensor
    """Squared output error added in total once that neuron is gone (F64)."""

    def kept(self, expert: int, count: int) -> list[int]:
        """The ``count`` neurons that stay longest, best first."""
        order: list[int] = self.order_NI[expert].flip(0)[:count].tolist()
        return order

    def error_at(self, count: int) -> torch.Tensor:
        """Error [N] when every expert keeps ``count`` neurons."""
        removed = self.order_NI.shape[1] - count
        if removed == 0:
            return torch.zeros(self.order_NI.shape[0], dtype=torch.float64)
        return self.error_NI[:, removed - 1]


def removal_path(
    normal_NII: torch.Tensor, down_NDI: torch.Tensor, *, ridge: float = 0.01
) -> RemovalPath:
    """Remove all neurons of every expert in order of least added error.

    Args:
        normal_NII: Σ ω g² h hᵀ per expert.
        down_NDI: down projections.
        ridge: λ as a multiple of the layer's mean diagonal; keeps neurons that no token
            used (and experts that no token reached) well defined, and cheapest.

    Memory: twice the normal matrices in FP64 up to an expert width of 1024, in FP32 beyond.
    """
    experts, width, _ = normal_NII.shape
    step = -(-width // ROUNDS)
    order_NI = torch.empty(experts, width, dtype=torch.int64)
    error_NI = torch.empty(experts, width, dtype=torch.float64)
    for expert in range(experts):
        inverse = damped_inverse(normal_NII, expert, ridge)
        weight_ID = down_NDI[expert].T.to(inverse.dtype).clone()
        order, error = _peel(inverse, weight_ID, step)
        order_NI[expert], error_NI[expert] = order, error
    return RemovalPath(order_NI=order_NI, error_NI=error_NI)


def damped_inverse(normal_NII: torch.Tensor, expert: int, ridge: float) -> torch.Tensor:
    """(H + λI)⁻¹ [I, I] of one expert, λ a multiple of the layer's mean diagonal."""
    dtype = torch.float64 if normal_NII.shape[1] <= _FP64_WIDTH else torch.float32
    mean = float(normal_NII.diagonal(dim1=1, dim2=2).double().mean())
    hessian = normal_NII[expert].to(dtype)
    hessian.diagonal().add_(max(mean, torch.finfo(torch.float32).tiny) * ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def _peel(
    inverse: torch.Tensor, weight_ID: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove ``step`` neurons per round until none is left.

    The arrays shrink to the survivors now and then, so that the whole costs a fraction of I³.
    """
    width = len(weight_ID)
    alive = torch.arange(width)
    gone = torch.zeros(width, dtype=torch.bool)
    order: list[torch.Tensor] = []
    errors: list[torch.Tensor] = []
    total = 0.0
    norm_I = weight_ID.square().sum(dim=1)
    while not bool(gone.all()):
        left = int((~gone).sum())
        if left < 0.8 * len(alive):
            keep = torch.nonzero(~gone).squeeze(1)
            alive, inverse = alive[keep], inverse[keep][:, keep]
            weight_ID, norm_I, gone = weight_ID[keep], norm_I[keep], gone[keep]
        count = min(step, left)
        score_I = (norm_I / inverse.diagonal()).masked_fill(gone, torch.inf)
        chosen = torch.topk(score_I, count, largest=False, sorted=True).indices
        rows = inverse[chosen]
        pivot = torch.linalg.inv(rows[:, chosen]) if count > 1 else 1.0 / rows[:, chosen]
        update = pivot @ weight_ID[chosen]
        added = float((weight_ID[chosen] * update).sum())
        weight_ID -= rows.T @ update
        inverse -= rows.T @ (pivot @ rows)
        gone[chosen] = True
        weight_ID[gone] = 0.0
        # A removed neuron's row and column are zero up to rounding; make its pivot harmless.
        inverse.diagonal()[gone] = 1.0
        norm_I = weight_ID.square().sum(dim=1)
        order.append(alive[chosen])
        share = torch.arange(1, count + 1, dtype=torch.float64) / count
        errors.append(total + added * share)
        total += added
    return torch.cat(order), torch.cat(errors)
