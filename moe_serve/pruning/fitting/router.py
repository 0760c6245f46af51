"""Re-fitting the router's rows so that the layer's output is matched, and rows for merged experts.

A small change of the logits changes the output by J, one column per selected expert. With
y = Σ_k w_k f_k, weights w from a softmax or from sigmoids, J_k = w_k a_k (f_k - c y): the
softmax's Hessian is in Jᵀ J (a is 1, or one minus the sigmoid; c is 0 where sigmoids stand as they
are, else the inverse of the routing scale). The change of rows dR then minimises
Σ_t ω_t ‖residual_t - J_t (dR z_t)‖² + λ s ‖dR‖², by conjugate gradients on the tokens themselves:
the normal matrix, of side E · D, is never formed. λ, and whether the new rows are taken at all, is
decided on held-out tokens by the true error, with the selections that the new rows make.

Source: Gauss-Newton on the layer's output; router re-fit after pruning as in HARC and Router-KD.

Shape suffixes: T tokens, K experts selected per token, E router rows, D hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from moe_serve.calibration.mixture import Mixture, Router
from moe_serve.calibration.states import States
from moe_serve.pruning.fitting.refit import FitTokens
from moe_serve.pruning.plan import RouterFit


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """How some tokens' outputs answer to their logits, and what is missing."""

    z_TD: torch.Tensor
    chosen_TK: torch.Tensor
    """Experts selected."""
    gram_TKK: torch.Tensor
    """ω Jᵀ J."""
    slope_TK: torch.Tensor
    """ω Jᵀ residual."""

    def product(self, rows_ED: torch.Tensor) -> torch.Tensor:
        """Σ ω Jᵀ J (rows z) zᵀ: the normal matrix times a change of rows [E, D]."""
        shift_TK = (self.z_TD @ rows_ED.T).gather(1, self.chosen_TK)
        return self._spread(torch.bmm(self.gram_TKK, shift_TK[:, :, None])[:, :, 0], len(rows_ED))

    def gradient(self, rows: int) -> torch.Tensor:
        """Σ ω Jᵀ residual zᵀ [E, D]."""
        return self._spread(self.slope_TK, rows)

    def _spread(self, value_TK: torch.Tensor, rows: int) -> torch.Tensor:
        wide_TE = value_TK.new_zeros(len(value_TK), rows).scatter_(1, self.chosen_TK, value_TK)
        return wide_TE.T @ self.z_TD


def sensitivity(
    mixture: Mixture, z_TD: torch.Tensor, residual_TD: torch.Tensor, omega_T: torch.Tensor
) -> Sensitivity:
    """J at the present rows. Memory: T · K · D numbers."""
    router, rule = mixture.router, mixture.router.rule
    weight_TK, chosen_TK = router(z_TD).topk(rule.top_k, dim=1)
    output_TKD = _selected_outputs(mixture, z_TD, chosen_TK)
    change_TKD = output_TKD
    if rule.score == "softmax" or rule.renormalise:
        y_TD = torch.einsum("tk,tkd->td", weight_TK, output_TKD)
        change_TKD = output_TKD - y_TD[:, None] / rule.scale
    factor_TK = weight_TK
    if rule.score == "sigmoid":
        factor_TK = weight_TK * torch.sigmoid(-router.logits(z_TD)).gather(1, chosen_TK)
    j_TKD = change_TKD * factor_TK[:, :, None]
    weighted_TKD = j_TKD * omega_T[:, None, None]
    return Sensitivity(
        z_TD=z_TD,
        chosen_TK=chosen_TK,
        gram_TKK=torch.bmm(weighted_TKD, j_TKD.transpose(1, 2)),
        slope_TK=torch.bmm(weighted_TKD, residual_TD[:, :, None])[:, :, 0],
    )


def _selected_outputs(
    mixture: Mixture, z_TD: torch.Tensor, chosen_TK: torch.Tensor
) -> torch.Tensor:
    """Each selected expert's own output [T, K, D]."""
    found = z_TD.new_zeros(*chosen_TK.shape, z_TD.shape[1])
    for unit, index, _, h_tF in mixture.activations(z_TD):
        out_tD = h_tF @ unit.down_DF.T
        for owner in unit.owners:
            row, place = torch.nonzero(chosen_TK[index] == owner, as_tuple=True)
            found[index[row], place] += out_tD[row]
    return found


def solve_rows(parts: Sequence[Sensitivity], rows: int, penalty: float, steps: int) -> torch.Tensor:
    """The change of rows [E, D] by conjugate gradients from zero.

    Args:
        parts: the tokens, in batches.
        rows: E.
        penalty: λ s, added to the normal matrix's diagonal.
        steps: iterations at most; stopping early is a ridge of its own.
    """
    change_ED = torch.zeros(rows, parts[0].z_TD.shape[1], device=parts[0].z_TD.device)
    left_ED = _sum(p.gradient(rows) for p in parts)
    way_ED, size = left_ED.clone(), float(left_ED.square().sum())
    stop = size * 1e-8
    for _ in range(steps):
        if size <= stop:
            break
        ahead_ED = _sum(p.product(way_ED) for p in parts) + penalty * way_ED
        stride = size / float((way_ED * ahead_ED).sum())
        change_ED = change_ED + stride * way_ED
        left_ED = left_ED - stride * ahead_ED
        before, size = size, float(left_ED.square().sum())
        way_ED = left_ED + (size / before) * way_ED
    return change_ED


def _sum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sum of at least one tensor."""
    return functools.reduce(torch.add, tensors)


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedRows:
    """The outcome for one layer."""

    router: Router
    ridge: float | None
    """λ chosen; ``None`` where the rows stay as they were."""
    error_before: float
    """Held-out Σ ω ‖residual‖² / Σ ω."""
    error_after: float


def fit_rows(
    mixture: Mixture,
    inputs: States,
    residual: States,
    tokens: FitTokens,
    settings: RouterFit,
    dtype: torch.dtype,
) -> FittedRows:
    """Fit a layer's router rows; ``residual`` is updated to what remains.

    Args:
        mixture: the pruned layer.
        inputs: z, its inputs [T, D].
        residual: target - y [T, D]; on return with the new rows.
        tokens: batches and weights; those held out decide.
        settings: candidates and limits.
        dtype: number format of the stored rows; they are rounded to it.
    """
    parts, traces = [], 0.0
    for batch in tokens.batches:
        z_TD, e_TD = batch.load_flat(inputs), batch.load_flat(residual)
        fit_T = tokens.omega_T[batch.tokens] * ~tokens.held_T[batch.tokens]
        used = torch.nonzero(fit_T).squeeze(1)
        if len(used):
            part = sensitivity(mixture, z_TD[used], e_TD[used], fit_T[used].to(z_TD.device))
            parts.append(part)
            diagonal_T = part.gram_TKK.diagonal(dim1=1, dim2=2).sum(dim=1)
            traces += float((diagonal_T * part.z_TD.square().sum(dim=1)).sum())
    present_ED = mixture.router.weight_ND
    before = held_error(mixture, mixture, inputs, residual, tokens)
    best, best_error, chosen = mixture, before * (1 - settings.margin), None
    for ridge in settings.ridges if parts else ():
        scale = traces / present_ED.numel()
        change_ED = solve_rows(parts, len(present_ED), ridge * scale, settings.steps)
        rows_ED = (present_ED + change_ED).to(dtype).float()
        router = dataclasses.replace(mixture.router, weight_ND=rows_ED)
        changed = dataclasses.replace(mixture, router=router)
        error = held_error(mixture, changed, inputs, residual, tokens)
        if error < best_error:
            best, best_error, chosen = changed, error, ridge
    if chosen is not None:
        for batch in tokens.batches:
            z_TD = batch.load_flat(inputs)
            e_TD = batch.load_flat(residual) + mixture(z_TD) - best(z_TD)
            batch.store(residual, e_TD)
    after = best_error if chosen is not None else before
    return FittedRows(router=best.router, ridge=chosen, error_before=before, error_after=after)


def held_error(
    present: Mixture, changed: Mixture, inputs: States, residual: States, tokens: FitTokens
) -> float:
    """Mean squared residual of held-out tokens with changed rows."""
    total, weight = 0.0, 0.0
    for batch in tokens.batches:
        omega_T = tokens.omega_T[batch.tokens] * tokens.held_T[batch.tokens]
        used = torch.nonzero(omega_T).squeeze(1)
        if not len(used):
            continue
        e_TD = batch.load_flat(residual)[used]
        if changed is not present:
            z_TD = batch.load_flat(inputs)[used]
            e_TD = e_TD + present(z_TD) - changed(z_TD)
        omega_T = omega_T[used].to(e_TD.device)
        total += float((e_TD.square().sum(dim=1) * omega_T).sum())
        weight += float(omega_T.sum())
    return total / weight if weight else 0.0
