"""Optimal brain surgeon under re-fitting: the order in which an expert's neurons can go.

An expert's output is P W with P its routed, weighted neurons [T, I] and W = W_downᵀ [I, D].
Removing the set S and re-fitting the rest by least squares adds the squared error
tr(W_Sᵀ ((H⁻¹)_SS)⁻¹ W_S), H = PᵀP + λI (Hassibi & Stork 1993, eq. 5, for a group of weights;
Frantar & Alistarh 2023, arXiv 2301.00774, eq. 2). Neurons go in rounds, each time those that add
least, with H⁻¹ and W downdated after each round; up to a width of 192 a round is one neuron.

Of W only the inner products G = W Wᵀ [I, I] matter: a neuron's error is G_jj / (H⁻¹)_jj. Like
H⁻¹ they can be downdated some rounds later, at the speed of a product instead of the memory's;
experts that are far wider than the model are peeled by W, which is the smaller then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from moe_serve.pruning.device import CPU

_FP64_WIDTH: Final = 1024
"""Wider experts are handled in FP32: half the memory, and λ bounds the condition number."""
ROUNDS: Final = 192
"""Wider experts lose several neurons a round: the cost is I³ instead of I³ times I / 192."""

_DEFERRED: Final = 64
"""Neurons whose downdates are put off until they are worth a product of matrices."""
_WIDE: Final = 2
"""Experts so many times wider than the model are peeled by their weights."""
BATCH_BYTES: Final = 2**28
"""Experts that fit are handled side by side: of small ones a round's cost is mostly that of
beginning it."""


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
    normal_NII: torch.Tensor,
    down_NDI: torch.Tensor,
    *,
    root_DD: torch.Tensor | None = None,
    ridge: float = 0.01,
    device: torch.device = CPU,
) -> RemovalPath:
    """Remove all neurons of every expert in order of least added error.

    Args:
        normal_NII: Σ ω g² h hᵀ per expert.
        down_NDI: down projections.
        root_DD: R of the metric R Rᵀ in which the output's error counts; the plain one without.
        ridge: λ as a multiple of the layer's mean diagonal; keeps neurons that no token
            used (and experts that no token reached) well defined, and cheapest.
        device: where it is computed; what is given and returned stays on the processor.

    Memory of the device: 256 MiB, or one expert's matrix, weights and their inner products, three
    times, and the root; FP64 up to an expert width of 1024.
    """
    experts, width, _ = normal_NII.shape
    hidden = down_NDI.shape[1]
    step = -(-width // ROUNDS)
    order_NI = torch.empty(experts, width, dtype=torch.int64)
    error_NI = torch.empty(experts, width, dtype=torch.float64)
    root_DD = root_DD if root_DD is None else root_DD.to(device)
    together = max(1, BATCH_BYTES // bytes_of_one(width, hidden))
    for first in range(0, experts, together):
        some = range(first, min(first + together, experts))
        inverse_nII = torch.stack(
            [damped_inverse(normal_NII, expert, ridge, device) for expert in some]
        )
        weight_nID = in_metric(down_NDI[some.start : some.stop], root_DD, device).to(
            dtype_of(width)
        )
        if by_weights(width, hidden):
            order, error = peel(inverse_nII, weight_nID, step)
        else:
            order, error = peel_products(inverse_nII, weight_nID @ weight_nID.transpose(1, 2), step)
        order_NI[some.start : some.stop], error_NI[some.start : some.stop] = order, error
    return RemovalPath(order_NI=order_NI, error_NI=error_NI)


def by_weights(width: int, hidden: int) -> bool:
    """Whether experts are peeled by their weights, being so wide that these are the smaller."""
    return width > _WIDE * hidden


def dtype_of(width: int) -> torch.dtype:
    """In which removal paths of experts of a width are computed."""
    return torch.float64 if width <= _FP64_WIDTH else torch.float32


def bytes_of_one(width: int, hidden: int) -> int:
    """Of an expert's matrix and weights, and of their inner products where they are taken."""
    size = width * (width * (1 if by_weights(width, hidden) else 2) + hidden)
    return size * dtype_of(width).itemsize


def in_metric(
    down_nDI: torch.Tensor, root_DD: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """Down projections as rows [n, I, D], in the metric of :func:`removal_path`; a copy."""
    weight_nID = down_nDI.to(device).transpose(1, 2)
    return (
        weight_nID.clone(memory_format=torch.contiguous_format)
        if root_DD is None
        else weight_nID @ root_DD
    )


def damped_inverse(
    normal_NII: torch.Tensor, expert: int, ridge: float, device: torch.device = CPU
) -> torch.Tensor:
    """(H + λI)⁻¹ [I, I] of one expert, λ a multiple of the layer's mean diagonal."""
    mean = float(normal_NII.diagonal(dim1=1, dim2=2).double().mean())
    hessian = normal_NII[expert].to(device, dtype_of(normal_NII.shape[1]), copy=True)
    hessian.diagonal().add_(max(mean, torch.finfo(torch.float32).tiny) * ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


class _SoFar:
    """What went, and what it cost, round by round."""

    def __init__(self, nothing_n1: torch.Tensor) -> None:
        self._total_n1 = nothing_n1
        self._order: list[torch.Tensor] = []
        self._errors: list[torch.Tensor] = []

    def add(self, gone_nR: torch.Tensor, added_nRX: torch.Tensor) -> None:
        """A round: its neurons, and terms whose sum is the error that they add, evenly.

        What others had made up for already adds nothing up to rounding, which must be no gain.
        """
        added_n1 = added_nRX.sum(dim=(1, 2), dtype=torch.float64)[:, None].clamp(min=0)
        count = gone_nR.shape[1]
        share_R = torch.arange(1, count + 1, dtype=torch.float64, device=gone_nR.device) / count
        self._order.append(gone_nR)
        self._errors.append(self._total_n1 + added_n1 * share_R)
        self._total_n1 = self._total_n1 + added_n1

    def path(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Order of removal [n, I] and total error [n, I]."""
        return torch.cat(self._order, dim=1), torch.cat(self._errors, dim=1)


def peel(
    inverse_nII: torch.Tensor, weight_nID: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove ``step`` neurons of every expert per round until none is left.

    Experts are independent and lose equally many in a round, so they go side by side. The arrays
    shrink to the survivors now and then, so that the whole costs a fraction of I³ per expert. No
    step waits for a value: on a GPU the rounds follow one another without a stop.

    Args:
        inverse_nII: H⁻¹; used up.
        weight_nID: down projections, on the same device; used up.
        step: neurons per round.

    Returns:
        Order of removal [n, I] and total error [n, I], on that device.
    """
    experts, width, _ = weight_nID.shape
    device = weight_nID.device
    alive_nI = torch.arange(width, device=device).expand(experts, width)
    gone_nI = torch.zeros(experts, width, dtype=torch.bool, device=device)
    so_far = _SoFar(torch.zeros(experts, 1, dtype=torch.float64, device=device))
    left = width
    while left:
        if left < 0.8 * alive_nI.shape[1]:
            keep_nI = gone_nI.long().argsort(dim=1, stable=True)[:, :left]
            alive_nI = alive_nI.gather(1, keep_nI)
            inverse_nII = _rows(_rows(inverse_nII, keep_nI).transpose(1, 2), keep_nI)
            weight_nID = _rows(weight_nID, keep_nI)
            gone_nI = torch.zeros(experts, left, dtype=torch.bool, device=device)
        count = min(step, left)
        diagonal_nI = inverse_nII.diagonal(dim1=1, dim2=2)
        score_nI = (weight_nID.square().sum(dim=2) / diagonal_nI).masked_fill(gone_nI, torch.inf)
        chosen_nR = torch.topk(score_nI, count, dim=1, largest=False, sorted=True).indices
        rows_nRI = _rows(inverse_nII, chosen_nR)
        pivot_nRR = _inverse(_columns(rows_nRI, chosen_nR))
        lost_nRD = _rows(weight_nID, chosen_nR)
        update_nRD = pivot_nRR @ lost_nRD
        added_nRX = lost_nRD * update_nRD
        weight_nID.baddbmm_(rows_nRI.transpose(1, 2), update_nRD, alpha=-1.0)
        inverse_nII.baddbmm_(rows_nRI.transpose(1, 2), pivot_nRR @ rows_nRI, alpha=-1.0)
        gone_nI.scatter_(1, chosen_nR, value=True)
        weight_nID.masked_fill_(gone_nI[:, :, None], 0.0)
        # A removed neuron's row and column are zero up to rounding; make its pivot harmless.
        diagonal_nI.masked_fill_(gone_nI, 1.0)
        so_far.add(alive_nI.gather(1, chosen_nR), added_nRX)
        left -= count
    return so_far.path()


def peel_products(
    inverse_nII: torch.Tensor, product_nII: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`peel`, on the weights' inner products G, downdates put off.

    Removing R takes H⁻¹ to H⁻¹ - Xᵀ B and, as W loses Xᵀ W_R, G to G - Xᵀ Z - Zᵀ X, with B the rows
    R of H⁻¹, X = (B_RR)⁻¹ B, Z = G_R - ½ G_RR X. Both diagonals, which choose, follow at once; the
    rows that a round needs are made good for what is put off.

    Args:
        inverse_nII: H⁻¹; used up.
        product_nII: W Wᵀ, on the same device; used up.
        step: neurons per round.

    Returns:
        Order of removal [n, I] and total error [n, I], on that device.
    """
    experts, width, _ = inverse_nII.shape
    device = inverse_nII.device
    alive_nI = torch.arange(width, device=device).expand(experts, width)
    gone_nI = torch.zeros(experts, width, dtype=torch.bool, device=device)
    inverse_nI, product_nI = (
        m.diagonal(dim1=1, dim2=2).clone() for m in (inverse_nII, product_nII)
    )
    most, held = max(_DEFERRED, step), 0
    put_off = tuple(inverse_nII.new_empty(experts, most, width) for _ in range(3))
    so_far = _SoFar(torch.zeros(experts, 1, dtype=torch.float64, device=device))
    left = width
    while left:
        count, shrink = min(step, left), left < 0.8 * alive_nI.shape[1]
        if shrink or held + count > most:
            b_nKI, x_nKI, z_nKI = (m[:, :held] for m in put_off)
            inverse_nII.baddbmm_(x_nKI.transpose(1, 2), b_nKI, alpha=-1.0)
            product_nII.baddbmm_(x_nKI.transpose(1, 2), z_nKI, alpha=-1.0)
            product_nII.baddbmm_(z_nKI.transpose(1, 2), x_nKI, alpha=-1.0)
            held = 0
        if shrink:
            keep_nI = gone_nI.long().argsort(dim=1, stable=True)[:, :left]
            inverse_nII, product_nII = (
                _rows(_rows(m, keep_nI).transpose(1, 2), keep_nI)
                for m in (inverse_nII, product_nII)
            )
            alive_nI, inverse_nI, product_nI, gone_nI = (
                m.gather(1, keep_nI) for m in (alive_nI, inverse_nI, product_nI, gone_nI)
            )
            put_off = tuple(m.new_empty(experts, most, left) for m in put_off)
        b_nKI, x_nKI, z_nKI = (m[:, :held] for m in put_off)
        score_nI = (product_nI / inverse_nI).masked_fill(gone_nI, torch.inf)
        chosen_nR = torch.topk(score_nI, count, dim=1, largest=False, sorted=True).indices
        x_nRK, z_nRK = (_columns(m, chosen_nR).transpose(1, 2) for m in (x_nKI, z_nKI))
        b_nRI = _rows(inverse_nII, chosen_nR) - x_nRK @ b_nKI
        g_nRI = _rows(product_nII, chosen_nR) - x_nRK @ z_nKI - z_nRK @ x_nKI
        pivot_nRR, g_nRR = _inverse(_columns(b_nRI, chosen_nR)), _columns(g_nRI, chosen_nR)
        x_nRI = pivot_nRR @ b_nRI
        z_nRI = g_nRI - 0.5 * (g_nRR @ x_nRI)
        added_nRX = pivot_nRR * g_nRR
        inverse_nI -= (x_nRI * b_nRI).sum(dim=1)
        product_nI = (product_nI - 2.0 * (x_nRI * z_nRI).sum(dim=1)).clamp_(min=0.0)
        gone_nI = gone_nI.scatter(1, chosen_nR, value=True)
        inverse_nI.masked_fill_(gone_nI, 1.0)
        for matrix, rows in zip(put_off, (b_nRI, x_nRI, z_nRI), strict=True):
            matrix[:, held : held + count] = rows
        held += count
        so_far.add(alive_nI.gather(1, chosen_nR), added_nRX)
        left -= count
    return so_far.path()


def _inverse(block_nRR: torch.Tensor) -> torch.Tensor:
    """Of each small matrix; of a number without ado."""
    return torch.linalg.inv(block_nRR) if block_nRR.shape[1] > 1 else 1.0 / block_nRR


def _columns(matrix_nXI: torch.Tensor, index_nR: torch.Tensor) -> torch.Tensor:
    """Some columns of each matrix of a batch, copied."""
    return matrix_nXI.gather(2, index_nR[:, None, :].expand(-1, matrix_nXI.shape[1], -1))


def _rows(matrix_nIX: torch.Tensor, index_nR: torch.Tensor) -> torch.Tensor:
    """Some rows of each matrix of a batch, copied whole."""
    experts, width, columns = matrix_nIX.shape
    first_n1 = torch.arange(0, experts * width, width, device=matrix_nIX.device)[:, None]
    rows = matrix_nIX.reshape(experts * width, columns)
    return rows.index_select(0, (first_n1 + index_nR).flatten()).view(experts, -1, columns)
