"""Re-fitting the down projections of what is kept, so that it makes up for what is gone.

With P the kept neurons' routed activations [T, F], E the target minus what they now add, the new
down projection W minimises Σ_t ω_t ‖target - P W‖² + λ s ‖W - W₀‖², s the mean diagonal of the
normal matrix and W₀ the present values: ridge regression towards what training found. λ is the
candidate with the least error on held-out sequences. Where a layer keeps more neurons than one
normal matrix should hold, groups of them are solved in turn against the others' residual
(block-coordinate descent: its fixed point is the joint solution; the first group chooses λ).

Shape suffixes: T tokens, D hidden size, F neurons of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from moe_serve.calibration.mixture import Mixture, Unit
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch
from moe_serve.checkpoint.quantisation import Matrix, Scheme
from moe_serve.errors import CalibrationError
from moe_serve.pruning.plan import Refit
from moe_serve.pruning.rounding import round_neurons

_TINY: Final = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True, slots=True)
class FitTokens:
    """The calibration tokens of a re-fit."""

    batches: tuple[Batch, ...]
    omega_T: torch.Tensor
    """Weight of each token."""
    held_T: torch.Tensor
    """Whether the token chooses λ instead of fitting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """The outcome for one layer."""

    units: tuple[Unit, ...]
    stored: tuple[tuple[Matrix, ...], ...]
    """Each unit's down projection as it is stored, in one piece or several side by side."""
    ridge: float
    """λ chosen."""
    error_before: float
    """Σ ω ‖target - P W₀‖² / Σ ω."""
    error_after: float


class _Normal:
    """Normal equations of one group over one set of tokens, FP64."""

    def __init__(self, neurons: int, hidden: int) -> None:
        self.a_FF = torch.zeros(neurons, neurons, dtype=torch.float64)
        self.b_FD = torch.zeros(neurons, hidden, dtype=torch.float64)

    @property
    def mean_diagonal(self) -> float:
        """Σ ω p² per neuron."""
        return float(self.a_FF.diagonal().mean())

    def solve(self, start_FD: torch.Tensor, penalty: float) -> torch.Tensor:
        a_FF = self.a_FF.clone()
        a_FF.diagonal().add_(penalty)
        b_FD = self.b_FD + penalty * start_FD
        return torch.cholesky_solve(b_FD, torch.linalg.cholesky(a_FF))

    def error(self, w_FD: torch.Tensor) -> float:
        """Squared error up to the constant Σ‖t‖²."""
        return float(((self.a_FF @ w_FD) * w_FD).sum() - 2 * (self.b_FD * w_FD).sum())


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a unit's neurons lie among the group's columns."""

    unit: int
    columns: slice


def refit(
    mixture: Mixture,
    inputs: States,
    residual: States,
    tokens: FitTokens,
    settings: Refit,
    scheme: Scheme,
    width: int,
) -> Fitted:
    """Fit all down projections of a layer; ``residual`` is updated to what remains.

    Args:
        mixture: the pruned layer.
        inputs: z, the pruned layer's inputs [T, D].
        residual: E = target - P W₀ [T, D]; on return target - P W.
        tokens: batches and weights.
        settings: candidates and limits.
        scheme: format the down projections are stored in; they are rounded to it.
        width: b, neurons of a block; no block is cut.

    Raises:
        CalibrationError: the normal equations cannot be solved.
    """
    wide = mixture
    side = max(settings.side // width, 1) * width
    mixture = dataclasses.replace(wide, units=_split(wide.units, side))
    downs = [unit.down_DF.T.clone() for unit in mixture.units]
    stored: dict[int, Matrix] = {}
    before = _mean_square(residual, tokens)
    groups = list(_groups(mixture.units, side))
    # The only group's matrix has the diagonal; with several, a pass of its own is needed.
    scale = _mean_diagonal(mixture, inputs, tokens) if len(groups) > 1 else None
    candidates = settings.ridges
    for _ in range(settings.sweeps if len(groups) > 1 else 1):
        for slots in groups:
            present_FD = torch.cat([downs[s.unit] for s in slots])
            start_FD = torch.cat([mixture.units[s.unit].down_DF.T for s in slots])
            fit, held = _accumulate(mixture, slots, present_FD, inputs, residual, tokens)
            if scale is None:
                scale = max(fit.mean_diagonal + held.mean_diagonal, _TINY)
            ridge, w_FD = _best(fit, held, start_FD.double(), candidates, scale)
            candidates = (ridge,)
            fit.a_FF.diagonal().add_(ridge * scale)
            matrices = round_neurons(w_FD, fit.a_FF, scheme, [slot.columns for slot in slots])
            for slot, matrix in zip(slots, matrices, strict=True):
                stored[slot.unit] = matrix
                downs[slot.unit] = scheme.dequantise(matrix).T.to(present_FD.device)
            rounded_FD = torch.cat([downs[slot.unit] for slot in slots])
            _subtract(mixture, slots, rounded_FD - present_FD, inputs, residual, tokens)
    fitted = [
        dataclasses.replace(unit, down_DF=down.T.contiguous())
        for unit, down in zip(mixture.units, downs, strict=True)
    ]
    return Fitted(
        units=_join(fitted, wide.units),
        stored=_shared_out([stored[i] for i in range(len(fitted))], fitted, wide.units),
        ridge=candidates[0],
        error_before=before,
        error_after=_mean_square(residual, tokens),
    )


def _accumulate(
    mixture: Mixture,
    slots: Sequence[_Slot],
    present_FD: torch.Tensor,
    inputs: States,
    residual: States,
    tokens: FitTokens,
) -> tuple[_Normal, _Normal]:
    """Normal equations of a group against what the other groups leave."""
    hidden = present_FD.shape[1]
    fit, held = _Normal(len(present_FD), hidden), _Normal(len(present_FD), hidden)
    for batch in tokens.batches:
        p_TF, reached = _activations(mixture, slots, batch.load_flat(inputs))
        target_TD = batch.load_flat(residual) + p_TF @ present_FD
        root_T = tokens.omega_T[batch.tokens].to(p_TF.device).sqrt()[:, None]
        p_TF, target_TD = p_TF * root_T, target_TD * root_T
        held_T = tokens.held_T[batch.tokens].to(p_TF.device)
        for slot, index in reached:
            for normal, rows in ((fit, index[~held_T[index]]), (held, index[held_T[index]])):
                # A unit's rows are only the tokens that reached it: k/N of a dense product; the
                # matrix is symmetric, so its own columns and those after them are enough.
                first = slot.columns.start
                p_tF = p_TF[rows, first:]
                own_tF = p_tF[:, : slot.columns.stop - first]
                normal.a_FF[slot.columns, first:] += (own_tF.T @ p_tF).double().cpu()
                normal.b_FD[slot.columns] += (own_tF.T @ target_TD[rows]).double().cpu()
    for normal in (fit, held):
        for slot in slots:
            after = slice(slot.columns.stop, None)
            normal.a_FF[after, slot.columns] = normal.a_FF[slot.columns, after].T
    return fit, held


def _best(
    fit: _Normal, held: _Normal, start_FD: torch.Tensor, ridges: Sequence[float], scale: float
) -> tuple[float, torch.Tensor]:
    """λ with the least held-out error, and the solution on all tokens with it.

    Args:
        fit: the tokens that fit.
        held: the tokens that choose.
        start_FD: W₀.
        ridges: candidates for λ.
        scale: s of all tokens.
    """
    start_FD = start_FD.cpu()
    try:
        if len(ridges) == 1:
            ridge = ridges[0]
        elif bool(held.a_FF.any()):
            traces = [float(n.a_FF.diagonal().sum()) for n in (fit, held)]
            part = scale * traces[0] / sum(traces)
            ridge = min(ridges, key=lambda r: held.error(fit.solve(start_FD, r * part)))
        else:
            ridge = max(ridges)  # Nothing was held out: trust few tokens least.
        fit.a_FF += held.a_FF
        fit.b_FD += held.b_FD
        return ridge, fit.solve(start_FD, ridge * scale)
    except RuntimeError as exc:  # torch.linalg.LinAlgError is one
        raise CalibrationError(
            "the re-fit's normal equations are singular",
            remedy="calibrate on more tokens, or prune with --no-refit",
        ) from exc


def _mean_diagonal(mixture: Mixture, inputs: States, tokens: FitTokens) -> float:
    """Mean of Σ ω p² over all neurons of the layer: the scale of λ."""
    total, neurons = 0.0, sum(unit.width for unit in mixture.units)
    for batch in tokens.batches:
        omega_T = tokens.omega_T[batch.tokens]
        for _, index, weight_t, h_tF in mixture.activations(batch.load_flat(inputs)):
            square_t = (h_tF * weight_t[:, None]).square().sum(dim=1).double().cpu()
            total += float(square_t @ omega_T[index.cpu()].double())
    return max(total / neurons, _TINY)


def _activations(
    mixture: Mixture, slots: Sequence[_Slot], z_TD: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[_Slot, torch.Tensor]]]:
    """P [T, F] of a group, and for each of its units the tokens that reached it."""
    part = dataclasses.replace(mixture, units=tuple(mixture.units[s.unit] for s in slots))
    p_TF = z_TD.new_zeros(len(z_TD), slots[-1].columns.stop)
    reached = []
    by_unit = {id(mixture.units[s.unit]): s for s in slots}
    for unit, index, weight_t, h_tF in part.activations(z_TD):
        slot = by_unit[id(unit)]
        p_TF[index, slot.columns] = h_tF * weight_t[:, None]
        reached.append((slot, index))
    return p_TF, reached


def _subtract(
    mixture: Mixture,
    slots: Sequence[_Slot],
    change_FD: torch.Tensor,
    inputs: States,
    residual: States,
    tokens: FitTokens,
) -> None:
    """Take the effect of changed weights out of the residual."""
    for batch in tokens.batches:
        p_TF, _ = _activations(mixture, slots, batch.load_flat(inputs))
        batch.store(residual, batch.load_flat(residual) - p_TF @ change_FD)


def _mean_square(residual: States, tokens: FitTokens) -> float:
    total = 0.0
    for batch in tokens.batches:
        square_T = batch.load_flat(residual).square().sum(dim=1)
        total += float((square_T * tokens.omega_T[batch.tokens].to(square_T.device)).sum())
    return total / float(tokens.omega_T.sum())


def _groups(units: Sequence[Unit], side: int) -> Iterator[list[_Slot]]:
    slots: list[_Slot] = []
    used = 0
    for number, unit in enumerate(units):
        if slots and used + unit.width > side:
            yield slots
            slots, used = [], 0
        slots.append(_Slot(number, slice(used, used + unit.width)))
        used += unit.width
    if slots:
        yield slots


def _split(units: Sequence[Unit], side: int) -> tuple[Unit, ...]:
    """Cut units wider than ``side``; an expert is a sum of its neurons."""
    return tuple(
        dataclasses.replace(
            unit,
            gate_FD=unit.gate_FD[i : i + side],
            up_FD=unit.up_FD[i : i + side],
            down_DF=unit.down_DF[:, i : i + side],
        )
        for unit in units
        for i in range(0, unit.width, side)
    )


def _shared_out(
    stored: Sequence[Matrix], parts: Sequence[Unit], wholes: Sequence[Unit]
) -> tuple[tuple[Matrix, ...], ...]:
    """The stored pieces of each whole unit."""
    given, rest = [], iter(zip(stored, parts, strict=True))
    for whole in wholes:
        pieces, left = [], whole.width
        while left:
            matrix, part = next(rest)
            pieces.append(matrix)
            left -= part.width
        given.append(tuple(pieces))
    return tuple(given)


def _join(parts: Sequence[Unit], wholes: Sequence[Unit]) -> tuple[Unit, ...]:
    """Undo :func:`_split`, keeping the wholes' gate and up matrices."""
    joined, rest = [], iter(parts)
    for whole in wholes:
        downs: list[torch.Tensor] = []
        while sum(d.shape[1] for d in downs) < whole.width:
            downs.append(next(rest).down_DF)
        joined.append(dataclasses.replace(whole, down_DF=torch.cat(downs, dim=1)))
    return tuple(joined)
