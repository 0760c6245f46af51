"""Router rows of merged experts, for software whose routers know one row per expert.

In the compact format the members of a group keep their rows and their weights add up. With one row
left, that is r · z = log Σ_e exp(r_e · z) as well as a row can: ridge regression towards the mean
of the members' rows, on the pruned layer's own inputs. What the weights are then normalised by is
another sum, and selection counts a group once; so the true error of the layer on held-out tokens
decides between these rows and the plain mean.

Shape suffixes: T tokens, M merged experts, D hidden size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

import torch

from moe_serve.calibration.mixture import Mixture, Router
from moe_serve.calibration.states import States
from moe_serve.pruning.fitting.refit import FitTokens
from moe_serve.pruning.fitting.router import held_error
from moe_serve.pruning.plan import LayerPlan

_RIDGE: Final = 0.01
"""λ as a multiple of the inputs' mean square."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedRows:
    """The outcome for one layer."""

    router: Router
    chosen: str
    errors: dict[str, float]
    """Held-out Σ ω ‖residual‖² / Σ ω of each candidate."""


def join_rows(
    original: Router,
    present: Mixture,
    planned: LayerPlan,
    inputs: States,
    residual: States,
    tokens: FitTokens,
    dtype: torch.dtype,
) -> JoinedRows:
    """Choose the rows; ``residual`` is updated to what remains with them.

    Args:
        original: rows of all experts.
        present: the merged layer with the mean of its members' rows.
        planned: who is merged with whom.
        inputs: z, the pruned layer's inputs [T, D].
        residual: target - y [T, D] with the present rows.
        tokens: batches and weights; those held out decide.
        dtype: number format of the stored rows.
    """
    rows_MD = log_sum_rows(original, present.router.weight_ND, planned, inputs, tokens)
    router = dataclasses.replace(present.router, weight_ND=rows_MD.to(dtype).float())
    changed = dataclasses.replace(present, router=router)
    errors = {
        "mean": held_error(present, present, inputs, residual, tokens),
        "log-sum": held_error(present, changed, inputs, residual, tokens),
    }
    if errors["log-sum"] >= errors["mean"]:
        return JoinedRows(router=present.router, chosen="mean", errors=errors)
    for batch in tokens.batches:
        z_TD = batch.load_flat(inputs)
        e_TD = batch.load_flat(residual) + present(z_TD) - changed(z_TD)
        batch.store(residual, e_TD)
    return JoinedRows(router=router, chosen="log-sum", errors=errors)


def log_sum_rows(
    original: Router,
    mean_MD: torch.Tensor,
    planned: LayerPlan,
    inputs: States,
    tokens: FitTokens,
) -> torch.Tensor:
    """Rows [M, D] whose logits are nearest to the log-sum-exp of the members', FP32."""
    owners = planned.table().owners()
    hidden = mean_MD.shape[1]
    normal_DD = torch.zeros(hidden, hidden, dtype=torch.float64)
    goal_DM = torch.zeros(hidden, len(owners), dtype=torch.float64)
    for batch in tokens.batches:
        z_TD = batch.load_flat(inputs)
        omega_T = (tokens.omega_T[batch.tokens] * ~tokens.held_T[batch.tokens]).to(z_TD.device)
        logits_TN = z_TD @ original.weight_ND.T
        sums_TM = torch.stack([logits_TN[:, list(o)].logsumexp(dim=1) for o in owners], dim=1)
        scaled_TD = z_TD * omega_T[:, None]
        normal_DD += (scaled_TD.T @ z_TD).double().cpu()
        goal_DM += (scaled_TD.T @ (sums_TM - z_TD @ mean_MD.T)).double().cpu()
    scale = normal_DD.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    normal_DD.diagonal().add_(_RIDGE * scale)
    change_DM = torch.cholesky_solve(goal_DM, torch.linalg.cholesky(normal_DD))
    return mean_MD + change_DM.T.float().to(mean_MD.device)
