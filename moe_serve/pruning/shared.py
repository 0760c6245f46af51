"""The shared expert makes up for routed neurons that are gone: the re-fit changes what it adds.

Every token takes it, so it is the one place where a loss common to all tokens can be made good. It
loses no neuron, and its gate and up projections stay as they are.
"""

from __future__ import annotations

import dataclasses

from moe_serve.calibration.mixture import Mixture, Shared
from moe_serve.checkpoint.quantisation import COLUMNS, Matrix
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.errors import CheckpointError
from moe_serve.pruning.plan import Refit
from moe_serve.pruning.refit import Fitted


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
    mixture: Mixture, fitted: Fitted, checkpoint: Checkpoint, name: str
) -> tuple[Mixture, Fitted, Matrix]:
    """Undo :func:`with_shared` after a re-fit.

    Returns:
        The layer with its new shared expert, what was fitted of the routed units, and the shared
        expert's down projection as it is stored.
    """
    scheme = checkpoint.scheme(name)
    *units, own = fitted.units
    *stored, pieces = fitted.stored
    shared = dataclasses.replace(_shared(mixture), unit=own)
    down = scheme.join(list(pieces), COLUMNS, own.width, checkpoint.shape.hidden)
    return (
        dataclasses.replace(mixture, shared=shared),
        dataclasses.replace(fitted, units=tuple(units), stored=tuple(stored)),
        down,
    )


def _shared(mixture: Mixture) -> Shared:
    if mixture.shared is None:
        raise CheckpointError("this layer has no shared expert")
    return mixture.shared
