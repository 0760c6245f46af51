"""Recovery by distillation, one layer at a time (``--heal``).

After a closed-form re-fit everything that is left of a layer's experts is trained together: gate,
up and down projections, on the pruned model's own inputs, towards what the original model's
residual stream holds after the layer; the last layer towards what it predicts. The closed form is
the best that the down projections can do alone; this also moves the neurons themselves. The
router's rows move with them where tokens have to go elsewhere than in the original, experts being
gone or merged. Where they need not, layers came out the worse for it, twice as far off where scores
are sigmoids. Training stops where held-out tokens stop gaining, and a layer that gains nothing
stays as it was. The closed form on all tokens comes last; for the last layer only where it re-fits
a shared expert too and held-out tokens say so, as it leads back to the least squares that training
has left.

The projections by Muon (Jordan et al. 2024, as in Liu et al. 2025, arXiv 2502.16982), which moves a
matrix along the nearest orthogonal one to its gradient's momentum; router rows by Adam (Kingma & Ba
2015, arXiv 1412.6980). A step has the scale of the weights it moves: a share of their root mean
square.

Shape suffixes: T tokens, D hidden size, N experts.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from moe_serve.calibration.mixture import Mixture, Unit
from moe_serve.calibration.states import States
from moe_serve.errors import PlanError
from moe_serve.pruning.fitting.goals import Goal, Piece, rows
from moe_serve.pruning.fitting.refit import FitTokens
from moe_serve.pruning.plan import Heal

_BETAS: Final = (0.9, 0.95)
"""Adam's."""
_MUON_SCALE: Final = 0.2
"""Root mean square of an update that torch's Muon makes at a rate of one, scaled as Adam's is."""
_WARM_UP: Final = 10
"""Steps over which the rate rises."""
_BACK_OFF: Final = 5.0
STEPS: Final = 24
"""Steps of an epoch at least; with fewer the first, largest ones are all there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Healed:
    """A layer after training."""

    mixture: Mixture
    """The best on held-out tokens; the layer as it was where nothing was gained."""
    errors: tuple[float, ...]
    """Mean loss of held-out tokens before training and after each epoch."""


@torch.inference_mode(mode=False)
def heal(
    mixture: Mixture,
    inputs: States,
    goal: Goal,
    tokens: FitTokens,
    settings: Heal,
    *,
    reroutes: bool,
) -> Healed:
    """Train a pruned layer. Peak memory: its weights six times in FP32, one batch, and the goal's.

    Args:
        mixture: the pruned layer, its down projections fitted.
        inputs: z, the pruned layer's inputs [T, D].
        goal: what its output is measured by.
        tokens: weights, and which tokens are held out.
        settings: epochs and rate.
        reroutes: whether the router's rows are trained, too.

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
    size = min(settings.batch, sum(piece.length for piece in fit) // STEPS)

    def output(piece: Piece) -> torch.Tensor:
        return layer(rows(inputs, [piece], device))

    steps, step = settings.epochs * len(list(_batches(fit, size))), 0
    best, errors = _frozen(layer), [_mean(goal, output, tokens, held, device)]
    rate, lost, rng = settings.rate, 0, random.Random(0)
    optimisers = _optimisers(groups, rate, reroutes=reroutes)
    for _ in range(settings.epochs):
        rng.shuffle(fit)
        for batch in _batches(fit, size):
            factor = min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = group["full_rate"] * factor
            z_TD, omega_T = rows(inputs, batch, device), _weights(batch, tokens, device)
            with torch.enable_grad():
                loss_T = goal(layer(z_TD), batch)
                loss = (loss_T * omega_T).sum() / omega_T.sum().clamp(min=1e-12)
                for optimiser in optimisers:
                    optimiser.zero_grad(set_to_none=True)
                loss.backward()
            for optimiser in optimisers:
                optimiser.step()
            step += 1
        errors.append(_mean(goal, output, tokens, held, device))
        if errors[-1] < min(errors[:-1]):
            best, lost = _frozen(layer), 0
            continue
        lost += 1
        if lost > settings.patience:
            break
        # Too much moved: back to the best, and on without the rows, after that with smaller steps.
        if not reroutes:
            rate /= _BACK_OFF
        reroutes = False
        layer, groups = _trainable(best)
        optimisers = _optimisers(groups, rate, reroutes=reroutes)
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


def _optimisers(
    groups: list[list[torch.Tensor]], rate: float, *, reroutes: bool
) -> list[torch.optim.Optimizer]:
    """Muon for the projections, Adam for the router's rows; each group knows its full rate."""
    (router, *projections), scales = groups, [rate * _scale(group) for group in groups]
    adam = {"params": router, "full_rate": scales[0]}
    muon = [
        {"params": group, "full_rate": scale / _MUON_SCALE}
        for group, scale in zip(projections, scales[1:], strict=True)
    ]
    found: list[torch.optim.Optimizer] = [
        torch.optim.Muon(muon, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    ]
    return [*found, torch.optim.Adam([adam], betas=_BETAS)] if reroutes else found


def _pieces(tokens: FitTokens) -> Iterator[Piece]:
    """Sequences that take part: a weight of zero keeps a token out of every fit."""
    for batch in tokens.batches:
        count, length = batch.shape
        for number in range(count):
            start = batch.tokens.start + number * length
            if float(tokens.omega_T[start : start + length].sum()) > 0:
                yield Piece(start, length, bool(tokens.held_T[start]))


def _batches(pieces: list[Piece], size: int) -> Iterator[list[Piece]]:
    """Consecutive pieces of about ``size`` tokens; one at least."""
    batch: list[Piece] = []
    used = 0
    for piece in pieces:
        batch.append(piece)
        used += piece.length
        if used >= size:
            yield batch
            batch, used = [], 0
    if batch:
        yield batch


@torch.inference_mode()
def held_error(goal: Goal, target: States, residual: States, tokens: FitTokens) -> float:
    """Mean loss of held-out tokens where a layer's output is target - residual."""
    device = tokens.batches[0].device

    def output(piece: Piece) -> torch.Tensor:
        return rows(target, [piece], device) - rows(residual, [piece], device)

    held = [piece for piece in _pieces(tokens) if piece.held]
    return _mean(goal, output, tokens, held, device)


def _weights(pieces: list[Piece], tokens: FitTokens, device: torch.device) -> torch.Tensor:
    omega_T = torch.cat([tokens.omega_T[p.start : p.start + p.length] for p in pieces])
    return omega_T.clone().to(device)


@torch.no_grad()
def _mean(
    goal: Goal,
    output: Callable[[Piece], torch.Tensor],
    tokens: FitTokens,
    pieces: list[Piece],
    device: torch.device,
) -> float:
    """Mean loss over the tokens of some sequences, given the layer's output on each."""
    total = weight = 0.0
    for piece in pieces:
        omega_T = _weights([piece], tokens, device)
        total += float((goal(output(piece), [piece]).double() * omega_T).sum())
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
