"""Re-fitting the down projections of what is kept, so that it makes up for what is gone.

With P the kept neurons' routed activations [T, F], E the target minus what they now add, the new
down projection W minimises Σ_t ω_t ‖target - P W‖² + λ Σ_f s_f ‖W_f - W₀_f‖², s_f the neuron's
entry on the normal matrix's diagonal and W₀ the present values: ridge regression towards what
training found, the same whatever a neuron's scale (Marquardt 1963). λ is the candidate with the
least error on held-out sequences. Where a layer keeps more neurons than one normal matrix should
hold, groups of them are solved in turn against the others' residual (block-coordinate descent: its
fixed point is the joint solution; the first group chooses λ).

Shape suffixes: T tokens, D hidden size, F neurons of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from moe_serve.calibration.mixture import Unit
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch
from moe_serve.checkpoint.quantisation import Matrix, Scheme
from moe_serve.errors import CalibrationError
from moe_serve.pruning.fitting.rounding import round_neurons
from moe_serve.pruning.fitting.routed import Reached, Routed
from moe_serve.pruning.plan import Refit

_TINY: Final = torch.finfo(torch.float32).tiny
_FLOOR: Final = 1e-6
"""s_f at least, of the mean: a neuron that no token used stays as it is."""
CHUNK: Final = 16_384
"""Tokens whose products are summed in FP32; sums of these are FP64."""


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
    """Normal equations of one group over one set of tokens, FP64, for a change of its weights."""

    def __init__(self, a_FF: torch.Tensor, b_FD: torch.Tensor) -> None:
        self.a_FF = a_FF
        """Σ ω p pᵀ."""
        self.b_FD = b_FD
        """Σ ω p eᵀ, e the residual."""

    @classmethod
    def empty(cls, neurons: int, hidden: int, device: torch.device) -> _Normal:
        """Before the first token."""
        a_FF, b_FD = (
            torch.zeros(neurons, columns, dtype=torch.float64, device=device)
            for columns in (neurons, hidden)
        )
        return cls(a_FF, b_FD)

    def rough(self) -> _Normal:
        """The same in FP32: enough to tell candidates for λ apart, at half the time."""
        return _Normal(self.a_FF.float(), self.b_FD.float())

    def penalty(self, ridge: float) -> torch.Tensor:
        """λ s [F]."""
        scale_F = self.a_FF.diagonal()
        return ridge * scale_F.clamp(min=max(float(scale_F.mean()) * _FLOOR, _TINY))

    def add(
        self, slots: Sequence[_Slot], reached: Mapping[int, Reached], e_TD: torch.Tensor
    ) -> None:
        """Add some tokens: p of each piece times √ω, and √ω e.

        Two pieces meet only in the tokens that reached both. That is about (k/N)² of a dense
        product; the matrix is symmetric, so half of the pairs are enough.
        """
        present = [slot for slot in slots if slot.piece in reached]
        place_T = torch.empty(len(e_TD), dtype=torch.int64, device=e_TD.device)
        for number, slot in enumerate(present):
            index_t, p_tF = reached[slot.piece]
            self.b_FD[slot.columns] += (p_tF.T @ e_TD[index_t]).double()
            self.a_FF[slot.columns, slot.columns] += (p_tF.T @ p_tF).double()
            place_T.fill_(-1)
            place_T[index_t] = torch.arange(len(index_t), device=e_TD.device)
            for other in present[number + 1 :]:
                other_t, q_tF = reached[other.piece]
                place_t = place_T[other_t]
                both_t = torch.nonzero(place_t >= 0).squeeze(1)
                if len(both_t):
                    met_FF = p_tF[place_t[both_t]].T @ q_tF[both_t]
                    self.a_FF[slot.columns, other.columns] += met_FF.double()

    def mirror(self, slots: Sequence[_Slot]) -> None:
        """Fill in the other half."""
        for slot in slots:
            after = slice(slot.columns.stop, None)
            self.a_FF[after, slot.columns] = self.a_FF[slot.columns, after].T

    def solve(self, pull_FD: torch.Tensor, ridge: float) -> torch.Tensor:
        """The change Δ that minimises Σ ω ‖e - p Δ‖² + λ Σ s_f ‖Δ_f - pull_f‖²."""
        penalty_F, a_FF = self.penalty(ridge), self.a_FF.clone()
        a_FF.diagonal().add_(penalty_F)
        torch.linalg.cholesky(a_FF, out=a_FF)
        return torch.cholesky_solve(self.b_FD + penalty_F[:, None] * pull_FD, a_FF)

    def error(self, change_FD: torch.Tensor) -> float:
        """Squared error with a change, up to what it is without."""
        return float(((self.a_FF @ change_FD - 2 * self.b_FD) * change_FD).sum())


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a piece's neurons lie among the group's columns."""

    piece: int
    columns: slice


def refit(
    routed: Routed, residual: States, tokens: FitTokens, settings: Refit, scheme: Scheme
) -> Fitted:
    """Fit all down projections of a layer; ``residual`` is updated to what remains.

    Args:
        routed: the pruned layer on the tokens, no piece wider than :func:`side_of`.
        residual: E = target - P W₀ [T, D]; on return target - P W.
        tokens: batches and weights.
        settings: candidates and limits.
        scheme: format the down projections are stored in; they are rounded to it.

    Raises:
        CalibrationError: the normal equations cannot be solved.
    """
    pieces, wholes = routed.pieces, routed.mixture.units
    downs = [piece.down_DF.T.clone() for piece in pieces]
    stored: dict[int, Matrix] = {}
    before = mean_square(residual, tokens)
    groups = list(_groups(pieces, settings.side))
    candidates = settings.ridges
    for _ in range(settings.sweeps if len(groups) > 1 else 1):
        for slots in groups:
            present_FD = torch.cat([downs[s.piece] for s in slots])
            start_FD = torch.cat([pieces[s.piece].down_DF.T for s in slots])
            # Once λ is chosen nothing has to be held out for it.
            held_T = tokens.held_T if len(candidates) > 1 else torch.zeros_like(tokens.held_T)
            fit, held = _accumulate(routed, slots, residual, tokens.omega_T, held_T)
            pull_FD = (start_FD - present_FD).double()
            ridge, change_FD = _best(fit, held, pull_FD, candidates)
            candidates = (ridge,)
            fit.a_FF.diagonal().add_(fit.penalty(ridge))
            w_FD = (present_FD + change_FD).cpu()
            matrices = round_neurons(w_FD, fit.a_FF, scheme, [slot.columns for slot in slots])
            for slot, matrix in zip(slots, matrices, strict=True):
                stored[slot.piece] = matrix
                downs[slot.piece] = scheme.dequantise(matrix).T.to(present_FD.device)
            rounded_FD = torch.cat([downs[slot.piece] for slot in slots])
            _subtract(routed, slots, rounded_FD - present_FD, residual)
    fitted = [
        dataclasses.replace(piece, down_DF=down.T.contiguous())
        for piece, down in zip(pieces, downs, strict=True)
    ]
    return Fitted(
        units=_join(fitted, wholes),
        stored=_shared_out([stored[i] for i in range(len(fitted))], fitted, wholes),
        ridge=candidates[0],
        error_before=before,
        error_after=mean_square(residual, tokens),
    )


def side_of(settings: Refit, width: int) -> int:
    """Neurons of a piece at most, whole blocks of ``width``."""
    return max(settings.side // width, 1) * width


def _accumulate(
    routed: Routed,
    slots: Sequence[_Slot],
    residual: States,
    omega_T: torch.Tensor,
    held_T: torch.Tensor,
) -> tuple[_Normal, _Normal | None]:
    """Normal equations of a group against what all pieces leave: of tokens that fit, and held."""
    neurons, hidden = slots[-1].columns.stop, routed.pieces[0].down_DF.shape[0]
    device = routed.pieces[0].down_DF.device
    fit = _Normal.empty(neurons, hidden, device)
    held = _Normal.empty(neurons, hidden, device) if bool(held_T.any()) else None
    wanted = [slot.piece for slot in slots]
    for numbers in _chunks(routed.batches):
        parts: dict[bool, dict[int, list[Reached]]] = {False: {}, True: {}}
        errors, ahead = [], 0
        for number in numbers:
            batch = routed.batches[number]
            e_TD = batch.load_flat(residual)
            root_T = omega_T[batch.tokens].to(e_TD.device).sqrt()
            apart_T = held_T[batch.tokens].to(e_TD.device)
            errors.append(e_TD * root_T[:, None])
            for piece, (index_t, p_tF) in routed.batch(number, wanted):
                root_t, held_t = root_T[index_t], apart_T[index_t]
                for into, mask_t in ((False, ~held_t), (True, held_t)):
                    rows = torch.nonzero(mask_t & (root_t > 0.0)).squeeze(1)
                    if len(rows):
                        scaled_tF = p_tF[rows] * root_t[rows, None]
                        part = Reached(index_t[rows] + ahead, scaled_tF)
                        parts[into].setdefault(piece, []).append(part)
            ahead += len(e_TD)
        chunk_TD = torch.cat(errors)
        for normal, into in ((fit, False), (held, True)):
            if normal is None:
                continue
            reached = {
                piece: Reached(
                    torch.cat([f.index_t for f in found]), torch.cat([f.p_tF for f in found])
                )
                for piece, found in parts[into].items()
            }
            normal.add(slots, reached, chunk_TD)
    for normal in (fit, held):
        if normal is not None:
            normal.mirror(slots)
    return fit, held


def _chunks(batches: Sequence[Batch]) -> Iterator[list[int]]:
    """Numbers of consecutive batches of about :data:`CHUNK` tokens."""
    numbers: list[int] = []
    size = 0
    for number, batch in enumerate(batches):
        numbers.append(number)
        size += batch.tokens.stop - batch.tokens.start
        if size >= CHUNK:
            yield numbers
            numbers, size = [], 0
    if numbers:
        yield numbers


def _best(
    fit: _Normal, held: _Normal | None, pull_FD: torch.Tensor, ridges: Sequence[float]
) -> tuple[float, torch.Tensor]:
    """λ with the least held-out error, and the change on all tokens with it.

    Args:
        fit: the tokens that fit; all of them on return.
        held: the tokens that choose, if any.
        pull_FD: W₀ less the present weights.
        ridges: candidates for λ.
    """
    try:
        if len(ridges) == 1:
            ridge = ridges[0]
        elif held is not None and bool(held.a_FF.any()):
            ridge = _least(fit, held, pull_FD, ridges)
        else:
            ridge = max(ridges)  # Nothing was held out: trust few tokens least.
        if held is not None:
            fit.a_FF += held.a_FF
            fit.b_FD += held.b_FD
        return ridge, fit.solve(pull_FD, ridge)
    except RuntimeError as exc:  # torch.linalg.LinAlgError is one
        raise CalibrationError(
            "the re-fit's normal equations are singular",
            remedy="calibrate on more tokens, or prune with --no-refit",
        ) from exc


def _least(fit: _Normal, held: _Normal, pull_FD: torch.Tensor, ridges: Sequence[float]) -> float:
    """λ of least held-out error, from the greatest down until the error grows again.

    Less λ is more trust in the tokens that fit: held-out error falls while that is earned.
    """
    best, least = max(ridges), float("inf")
    rough_fit, rough_held, rough_FD = fit.rough(), held.rough(), pull_FD.float()
    for ridge in sorted(ridges, reverse=True):
        try:
            error = rough_held.error(rough_fit.solve(rough_FD, ridge))
        except RuntimeError:  # Too nearly singular for FP32.
            error = held.error(fit.solve(pull_FD, ridge))
        if error >= least:
            break
        best, least = ridge, error
    return best


def _subtract(
    routed: Routed, slots: Sequence[_Slot], change_FD: torch.Tensor, residual: States
) -> None:
    """Take the effect of changed weights out of the residual."""
    columns = {slot.piece: slot.columns for slot in slots}
    for number, batch in enumerate(routed.batches):
        left_TD = batch.load_flat(residual)
        for piece, (index_t, p_tF) in routed.batch(number, columns):
            left_TD.index_add_(0, index_t, p_tF @ change_FD[columns[piece]], alpha=-1)
        batch.store(residual, left_TD)


def mean_square(residual: States, tokens: FitTokens) -> float:
    """Σ ω ‖residual‖² / Σ ω."""
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
    """Undo ``routed.cut``, keeping the wholes' gate and up matrices."""
    joined, rest = [], iter(parts)
    for whole in wholes:
        downs: list[torch.Tensor] = []
        while sum(d.shape[1] for d in downs) < whole.width:
            downs.append(next(rest).down_DF)
        joined.append(dataclasses.replace(whole, down_DF=torch.cat(downs, dim=1)))
    return tuple(joined)
