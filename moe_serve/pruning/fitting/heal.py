"""Recovery by distillation, one layer at a time (``--heal``).

After a closed-form re-fit everything that is left of a layer's experts is trained together: gate,
up and down projections and the router's rows, on the pruned model's own inputs, towards what the
original model's residual stream holds after the layer. The closed form is the best that the down
projections can do alone; this also moves the neurons themselves and what reaches them. Training
stops where held-out tokens stop gaining, and a layer that gains nothing stays as it was. The
closed form on all tokens comes last.

Adam (Kingma & Ba 2015, arXiv 1412.6980) with a step in each kind of weight's own scale: the
learning rate is a share of its root mean square.

Shape suffixes: T tokens, D hidden size, N experts.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moe_serve.calibration.mixture import Mixture, Unit
from moe_serve.calibration.states import States
from moe_serve.errors import PlanError
from moe_serve.pruning.fitting.refit import FitTokens
from moe_serve.pruning.plan import Heal

_BETAS = (0.9, 0.95)
_WARM_UP = 10
"""Steps over which the rate rises."""


_BACK_OFF = 5.0
_STEPS = 24
"""Steps of an epoch at least; with fewer Adam's first, largest ones are all there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Healed:
    """A layer after training."""

    mixture: Mixture
    """The best on held-out tokens; the layer as it was where nothing was gained."""
    errors: tuple[float, ...]
    """Mean ‖target - y‖² of held-out tokens before training and after each epoch."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A sequence's rows in the files."""

    start: int
    length: int
    held: bool


@torch.inference_mode(mode=False)
def heal(
    mixture: Mixture, inputs: States, target: States, tokens: FitTokens, settings: Heal
) -> Healed:
    """Train a pruned layer. Peak memory: its weights five times in FP32, and one batch.

    Args:
        mixture: the pruned layer, its down projections fitted.
        inputs: z, the pruned layer's inputs [T, D].
        target: what its output should be [T, D].
        tokens: weights, and which tokens are held out.
        settings: epochs and rate.

    Raises:
        PlanError: no sequence is held out, so nothing could tell when to stop.
    """
    device = mixture.router.weight_ND.device
    pieces = list(_pieces(tokens))
    fit = [piece for piece in pieces if not piece.held]
    held = [piece for piece in pieces if piece.held]
    if not held or not fit:
        raise PlanError(
            "healing needs held-out sequences to know when to stop",
            where="--heal",
            remedy="calibrate on more tokens, or with a shorter --sequence-length",
        )
    layer, groups = _trainable(mixture)
    size = min(settings.batch, sum(piece.length for piece in fit) // _STEPS)
    steps, step = settings.epochs * len(list(_batches(fit, size))), 0
    best, errors = _frozen(layer), [_error(layer, inputs, target, tokens, held)]
    rate, lost, rng = settings.rate, 0, random.Random(0)
    optimiser, rates = _optimiser(groups, rate)
    for _ in range(settings.epochs):
        rng.shuffle(fit)
        for batch in _batches(fit, size):
            factor = min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
            for group, full in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = full * factor
            z_TD, y_TD, omega_T = _load(batch, inputs, target, tokens, device)
            with torch.enable_grad():
                square_T = (layer(z_TD) - y_TD).square().sum(dim=1)
                loss = (square_T * omega_T).sum() / omega_T.sum().clamp(min=1e-12)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
            optimiser.step()
            step += 1
        errors.append(_error(layer, inputs, target, tokens, held))
        if errors[-1] < min(errors[:-1]):
            best, lost = _frozen(layer), 0
            continue
        lost += 1
        if lost > settings.patience:
            break
        # Steps too large for this layer: back to its best, and on with smaller ones.
        rate /= _BACK_OFF
        layer, groups = _trainable(best)
        optimiser, rates = _optimiser(groups, rate)
    return Healed(mixture=best, errors=tuple(errors))


def apart(tokens: FitTokens) -> FitTokens:
    """The same tokens without those held out; every fifth of the other sequences chooses λ."""
    held_T = torch.zeros_like(tokens.held_T)
    for number, piece in enumerate(p for p in _pieces(tokens) if not p.held):
        held_T[piece.start : piece.start + piece.length] = number % 5 == 4
    return FitTokens(
        batches=tokens.batches,
        omega_T=tokens.omega_T.masked_fill(tokens.held_T, 0.0),
        held_T=held_T,
    )


def _optimiser(
    groups: list[list[torch.Tensor]], rate: float
) -> tuple[torch.optim.Adam, list[float]]:
    """Adam, and the full rate of each of its groups."""
    rates = [rate * _scale(group) for group in groups]
    pairs = zip(groups, rates, strict=True)
    settings = [{"params": group, "lr": full} for group, full in pairs]
    return torch.optim.Adam(settings, betas=_BETAS), rates


def _pieces(tokens: FitTokens) -> Iterator[_Piece]:
    """Sequences that take part: a weight of zero keeps a token out of every fit."""
    for batch in tokens.batches:
        count, length = batch.shape
        for number in range(count):
            start = batch.tokens.start + number * length
            if float(tokens.omega_T[start : start + length].sum()) > 0:
                yield _Piece(start, length, bool(tokens.held_T[start]))


def _batches(pieces: list[_Piece], size: int) -> Iterator[list[_Piece]]:
    """Consecutive pieces of about ``size`` tokens; one at least."""
    batch: list[_Piece] = []
    used = 0
    for piece in pieces:
        batch.append(piece)
        used += piece.length
        if used >= size:
            yield batch
            batch, used = [], 0
    if batch:
        yield batch


def _load(
    pieces: list[_Piece], inputs: States, target: States, tokens: FitTokens, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z_TD, y_TD = (
        torch.cat([states.read(p.start, p.length) for p in pieces]).to(device)
        for states in (inputs, target)
    )
    omega_T = torch.cat([tokens.omega_T[p.start : p.start + p.length] for p in pieces])
    return z_TD, y_TD, omega_T.clone().to(device)


@torch.no_grad()
def _error(
    layer: Mixture, inputs: States, target: States, tokens: FitTokens, held: list[_Piece]
) -> float:
    total = weight = 0.0
    for piece in held:
        z_TD, y_TD, omega_T = _load([piece], inputs, target, tokens, layer.router.weight_ND.device)
        square_T = (layer(z_TD) - y_TD).square().sum(dim=1).double()
        total += float((square_T * omega_T).sum())
        weight += float(omega_T.sum())
    return total / weight


def _trainable(mixture: Mixture) -> tuple[Mixture, list[list[torch.Tensor]]]:
    """A copy whose routed weights take gradients, and these by kind."""
    router = dataclasses.replace(
        mixture.router,
        weight_ND=mixture.router.weight_ND.clone().requires_grad_(),
        bias_N=None if mixture.router.bias_N is None else mixture.router.bias_N.clone(),
    )
    units = tuple(
        dataclasses.replace(
            unit,
            gate_FD=unit.gate_FD.clone().requires_grad_(),
            up_FD=unit.up_FD.clone().requires_grad_(),
            down_DF=unit.down_DF.clone().requires_grad_(),
        )
        for unit in mixture.units
    )
    shared = mixture.shared
    if shared is not None:
        gate_1D = None if shared.gate_1D is None else shared.gate_1D.clone()
        shared = dataclasses.replace(shared, unit=_copied(shared.unit), gate_1D=gate_1D)
    layer = dataclasses.replace(mixture, router=router, units=units, shared=shared)
    groups = [
        [router.weight_ND],
        [unit.gate_FD for unit in units],
        [unit.up_FD for unit in units],
        [unit.down_DF for unit in units],
    ]
    return layer, groups


def _copied(unit: Unit) -> Unit:
    """Tensors of inference mode can't take part in a graph; copies can."""
    return dataclasses.replace(
        unit,
        gate_FD=unit.gate_FD.clone(),
        up_FD=unit.up_FD.clone(),
        down_DF=unit.down_DF.clone(),
    )


@torch.no_grad()
def _frozen(layer: Mixture) -> Mixture:
    """The weights as they are now, apart from what training does next."""
    router = dataclasses.replace(layer.router, weight_ND=layer.router.weight_ND.detach().clone())
    units = tuple(_copied(unit) for unit in layer.units)
    return dataclasses.replace(layer, router=router, units=units)


def _scale(weights: list[torch.Tensor]) -> float:
    """Root mean square over all of them."""
    square = sum(float(w.detach().double().square().sum()) for w in weights)
    return math.sqrt(square / sum(w.numel() for w in weights))
