"""What a plan does to the model, measured on calibration texts kept out of its fit.

Nothing is written but hidden states: the plan is applied and re-fitted in memory, layer by layer,
beside the original, and both ends are compared. A choice between plans, or whether a step is worth
taking, is decided by this, not by a proxy.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from moe_serve.calibration.decoder import Decoder, Layer
from moe_serve.calibration.gradients import LayerGradients
from moe_serve.calibration.mixture import Mixture
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.stream import batches
from moe_serve.calibration.trace import Trace
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.staging import Staging
from moe_serve.errors import CalibrationError
from moe_serve.progress import Progress, Silent
from moe_serve.pruning.fitting.refit import FitTokens
from moe_serve.pruning.fitting.walk import Walk
from moe_serve.pruning.ground import Ground, Measured, Steps
from moe_serve.pruning.methods.neurons import loss_root
from moe_serve.pruning.plan import LayerPlan, Refit, RouterFit

TRIAL_TOKENS: Final = 16_384
"""Tokens of a trial, those it is measured on included."""
MEASURED: Final = 0.25
"""Share of a trial's sequences that measure."""
_PIECES: Final = 8
"""Of each domain, at least."""
_SHORTEST: Final = 128
"""Tokens of a piece, at least."""
_STATES: Final = "trial-states"
_HOPELESS: Final = 2.0
"""An option that loses so many times what the first one does before both are compensated is not
compensated: with this at infinity, re-fits gained at most 1.8 times what the first one's gained, by
the plans for two trained models at three sizes (96 options)."""


class Option(NamedTuple):
    """One way to prune a layer."""

    name: str
    plan: LayerPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Pick:
    """The way taken."""

    name: str
    plan: LayerPlan
    errors: dict[str, float]
    """Each option's error on held-out tokens after compensation, in the loss's metric; mean over
    domains of the mean over tokens. Those that had no hope are not among them."""
    bare: dict[str, float]
    """Every option's before compensation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Where plans are tried."""

    checkpoint: Checkpoint
    sequences: Sequences
    """All calibration sequences; a trial takes an even share of each domain."""
    folder: Path
    """For files: the hidden states of a walk, the original's of all layers. Stays for a resume."""
    device: torch.device
    batch_tokens: int
    staging: Staging | None = None
    """Remembers what is done, so that a killed run goes on from the layer it was at."""
    progress: Progress = field(default_factory=Silent)
    """Told about every layer of every trial."""

    def measure(
        self,
        name: str,
        layers: dict[int, LayerPlan],
        refit: Refit | None,
        router: RouterFit | None = None,
    ) -> Measured:
        """Apply some layers' plans in memory, then compare.

        Cost: about three forward passes over :data:`TRIAL_TOKENS` tokens, and the re-fits.

        Args:
            name: of what is measured, for the journal; the same plans whenever it is the same.
            layers: the plans.
            refit: how what is kept is re-fitted.
            router: how the router is.
        """
        return self._measured(self._common(name, layers, refit), layers, refit, router)

    def compare(
        self,
        sequences: Sequences,
        measured_T: torch.Tensor,
        layers: dict[int, LayerPlan],
        refit: Refit | None,
    ) -> Measured:
        """Apply some layers' plans in memory on some sequences; compare where the mask says so.

        Masked tokens take no part in any fit.
        """
        ground = self._ground("compare", sequences, measured_T, layers, refit, None)
        return self._measured(ground, layers, refit, None)

    @torch.inference_mode()
    def _measured(
        self,
        ground: Ground,
        layers: dict[int, LayerPlan],
        refit: Refit | None,
        router: RouterFit | None,
    ) -> Measured:
        def step(layer: Layer) -> bool:
            if layer.mixture is None or layer.index not in layers:
                ground.walk.pass_through(layer)
            else:
                ground.walk.fit(layer, layer.mixture, layers[layer.index], refit, router)
            return True

        self.progress.start("try a plan", ground.decoder.layers)
        ground.each(step)
        return ground.measured()

    @torch.inference_mode()
    def pick(
        self,
        name: str,
        changed: Collection[int],
        options: Callable[[int], list[Option]],
        metric: Callable[[int], LayerGradients],
        refit: Refit | None,
    ) -> tuple[dict[int, Pick], Measured]:
        """Take the option of least held-out error in each layer, one after the other.

        Each layer sees the inputs that the options taken below it leave. Ties go to the first.
        One that is far behind the first before compensation is not compensated. The others are
        weighed with the first one's λ; one that leads with it gets its own.

        Args:
            name: for the journal, as of :meth:`measure`.
            changed: layers to choose for.
            options: a layer's, the first being the one to beat.
            metric: what the loss feels at a layer's output.
            refit: how each option is compensated.

        Returns:
            What was taken, by layer, and what all of it does to the model.
        """
        picks: dict[int, Pick] = {}
        ground = self._common(name, changed, refit)

        def step(layer: Layer) -> dict[str, Any]:
            if layer.mixture is None or layer.index not in changed:
                ground.walk.pass_through(layer)
                return {}
            root_DD = loss_root(metric(layer.index)).to(self.device)
            ground.walk.meet(layer, layer.mixture)
            offered = options(layer.index)
            pick = _pick(ground, layer, layer.mixture, offered, root_DD, refit)
            ground.walk.advance(layer)
            picks[layer.index] = pick
            return {"taken": pick.name, "errors": pick.errors, "bare": pick.bare}

        self.progress.start("weigh methods", ground.decoder.layers)
        ground.each(step)
        for index in changed:
            if index not in picks:  # Taken before a kill: plans are made again, not stored.
                said = ground.steps.said(index)
                plans = {option.name: option.plan for option in options(index)}
                picks[index] = Pick(
                    name=said["taken"],
                    plan=plans[said["taken"]],
                    errors=said["errors"],
                    bare=said["bare"],
                )
        return picks, ground.measured()

    def _common(self, name: str, changed: Collection[int], refit: Refit | None) -> Ground:
        """The ground of all choices of a run; the original's states stay for those after it."""
        sequences, shape = trial_share(self.sequences), self.checkpoint.shape
        trace = Trace.kept(
            self.folder / _STATES,
            layers=shape.layers,
            hidden=shape.hidden,
            tokens=sequences.total,
        )
        measured_T = sequences.held_out(MEASURED)
        return self._ground(name, sequences, measured_T, changed, refit, trace)

    def _ground(
        self,
        name: str,
        sequences: Sequences,
        measured_T: torch.Tensor,
        changed: Collection[int],
        refit: Refit | None,
        trace: Trace | None,
    ) -> Ground:
        """A walk over some tokens, of which the measured neither fit nor choose λ.

        Raises:
            CalibrationError: none are measured.
        """
        if not bool(measured_T.any()):
            raise CalibrationError(
                "too few to measure on what they were not fitted to",
                where="texts",
                remedy="give more --tokens, or choose one method with --method",
            )
        tokens = FitTokens(
            batches=tuple(batches(sequences, self.batch_tokens, self.device)),
            omega_T=sequences.weights().masked_fill(measured_T, 0.0),
            held_T=sequences.held_out((refit or Refit()).holdout) & ~measured_T,
        )
        decoder = Decoder(self.checkpoint, self.device)
        place, hidden = self.folder / f"trial-{name}", self.checkpoint.shape.hidden
        steps = Steps(name, place, self.staging, self.progress)
        trace = trace or Trace.passing(place, layers=decoder.layers, hidden=hidden)
        trace.states[0].path.parent.mkdir(exist_ok=True)
        first = min(changed, default=decoder.layers)
        walk = Walk(decoder, sequences, tokens, place, trace, first=first)
        return Ground(
            decoder=decoder,
            walk=walk,
            steps=steps,
            tokens=tokens,
            measured_T=measured_T,
            sequences=sequences,
        )


def _pick(
    ground: Ground,
    layer: Layer,
    mixture: Mixture,
    offered: list[Option],
    root_DD: torch.Tensor,
    refit: Refit | None,
) -> Pick:
    """The option that leaves the least error in a layer; the walk then stands where it leads."""
    walk, taken = ground.walk, offered[0]
    errors: dict[str, float] = {}
    bare: dict[str, float] = {}

    def attempt(option: Option, by: Refit | None) -> float | None:
        """λ, where something was re-fitted."""

        def hopeful(pruned: Mixture) -> bool:
            bare[option.name] = ground.error(root_DD, pruned)
            return not bare[option.name] > _HOPELESS * bare[offered[0].name]

        fitted = walk.attempt(layer, mixture, option.plan, by, hopeful=hopeful)
        if by is None:  # Nothing that a trial tries changes a layer after it is built, but re-fits.
            errors[option.name] = bare[option.name]
        elif fitted.record:
            errors[option.name] = ground.error(root_DD)
        return fitted.record.get("ridge")

    ridge = attempt(taken, refit)
    walk.keep()
    same = refit and refit.model_copy(update={"ridges": (ridge,)})
    for option in offered[1:]:
        attempt(option, same)
        if refit and errors.get(option.name, math.inf) < errors[taken.name]:
            attempt(option, refit)
        if errors.get(option.name, math.inf) < errors[taken.name]:
            taken = option
            walk.keep()
    walk.recall()
    return Pick(name=taken.name, plan=taken.plan, errors=errors, bare=bare)


def trial_share(sequences: Sequences) -> Sequences:
    """About :data:`TRIAL_TOKENS` tokens, the same share of every domain's sequences, evenly spaced.

    Sequences are cut where a domain would have too few of them for all parts they have to play:
    fitting, choosing λ, measuring.
    """
    length = max(TRIAL_TOKENS // (_PIECES * len(sequences.domains)), _SHORTEST)
    pieces = sequences.cut(length)
    every = max(1, round(pieces.total / TRIAL_TOKENS))
    seen: dict[int, int] = {}
    chosen = []
    for number, domain in enumerate(pieces.domain):
        if seen.setdefault(domain, 0) % every == 0:
            chosen.append(number)
        seen[domain] += 1
    return pieces.subset(chosen)
