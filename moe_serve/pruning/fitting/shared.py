"""The shared expert makes up for routed neurons that are gone: the re-fit changes what it adds.

Every token takes it, so it is the one place where a loss common to all tokens can be made good. It
loses no neuron, and its gate and up projections stay as they are.
"""

from __future__ import annotations

import dataclasses

import torch

from moe_serve.calibration.mixture import Mixture, Shared
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch
from moe_serve.checkpoint.quantisation import COLUMNS, Matrix, Scheme
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.errors import CheckpointError
from moe_serve.pruning.fitting.refit import Fitted, FitTokens
from moe_serve.pruning.plan import Refit


def shared_down(checkpoint: Checkpoint, layer: int, refit: Refit | None) -> str | None:
    """The matrix that a re-fit of a layer changes beside the routed experts'; ``None``: none.

    Quantised ones are left alone: no neuron of theirs goes, so there is no need to round again what
    was rounded with more care.
    """
    names = checkpoint.family.shared_names(layer)
    if refit is None or not refit.shared or names is None or not checkpoint.has(names.gate):
        return None
    scheme = checkpoint.scheme(names.down)
    return names.down if scheme.exact and scheme == checkpoint.expert_scheme(layer)[2] else None


def shared_tensors(checkpoint: Checkpoint, layer: int, refit: Refit | None) -> set[str]:
    """Names in the files of what :func:`shared_down` finds."""
    name = shared_down(checkpoint, layer, refit)
    return set(checkpoint.scheme(name).tensors(name).values()) if name else set()


def with_shared(mixture: Mixture) -> Mixture:
    """The layer with its shared expert as the last unit, for a re-fit: it asks for units only."""
    return dataclasses.replace(mixture, units=(*mixture.units, _shared(mixture).unit))


def split_shared(
    mixture: Mixture,
    fitted: Fitted,
    scheme: Scheme,
    inputs: States,
    residual: States,
    tokens: FitTokens,
) -> tuple[Mixture, Fitted, Matrix | None]:
    """Undo :func:`with_shared` after a re-fit.

    Returns:
        The layer with its new shared expert, what was fitted of the routed units, and the shared
        expert's down projection as it is stored; ``None`` where the old one is better.
    """
    *units, own = fitted.units
    *stored, pieces = fitted.stored
    routed = dataclasses.replace(fitted, units=tuple(units), stored=tuple(stored))
    changed = dataclasses.replace(mixture, shared=dataclasses.replace(_shared(mixture), unit=own))
    if undone_if_better(mixture, changed, inputs, residual, tokens):
        return mixture, routed, None
    down = scheme.join(list(pieces), COLUMNS, own.width, len(own.down_DF))
    return changed, routed, down


def undone_if_better(
    before: Mixture, after: Mixture, inputs: States, residual: States, tokens: FitTokens
) -> bool:
    """Whether the error is less with the old down projection; the residual then is that of it.

    Where hardly anything is lost, rounding the whole expert again costs more than the fit gains.
    """
    old, new = _shared(before), _shared(after)
    change_FD = (new.unit.down_DF - old.unit.down_DF).T
    errors = [0.0, 0.0]
    for batch in tokens.batches:
        omega_T = tokens.omega_T[batch.tokens]
        for which, left_TD in enumerate(_residuals(after, batch, inputs, residual, change_FD)):
            errors[which] += float(left_TD.square().sum(dim=1).cpu() @ omega_T)
    if errors[0] <= errors[1]:
        return False
    for batch in tokens.batches:
        batch.store(residual, _residuals(after, batch, inputs, residual, change_FD)[1])
    return True


def _residuals(
    mixture: Mixture, batch: Batch, inputs: States, residual: States, change_FD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left with the new down projection, and with the old one."""
    shared, z_TD, left_TD = _shared(mixture), batch.load_flat(inputs), batch.load_flat(residual)
    p_TF = mixture.hidden(shared.unit, z_TD) * shared.scale(z_TD)
    return left_TD, left_TD + p_TF @ change_FD


def _shared(mixture: Mixture) -> Shared:
    if mixture.shared is None:
        raise CheckpointError(
            "this layer has no shared expert",
            where="config.json",
            remedy="report it: the family's row names a shared expert that is not there",
        )
    return mixture.shared
