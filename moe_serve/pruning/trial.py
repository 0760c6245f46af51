"""What a plan does to the model, measured on calibration texts kept out of its fit.

Nothing is written but hidden states: the plan is applied and re-fitted in memory, layer by layer,
beside the original, and both ends are compared. A choice between plans, or whether a step is worth
taking, is decided by this, not by a proxy.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import torch

from moe_serve.calibration.decoder import Decoder, Layer, OutputHead
from moe_serve.calibration.gradients import LayerGradients
from moe_serve.calibration.mixture import Mixture
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import batches
from moe_serve.calibration.trace import Trace
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.errors import CalibrationError
from moe_serve.progress import Progress, Silent
from moe_serve.pruning.fitting.refit import FitTokens
from moe_serve.pruning.fitting.walk import FittedLayer, Walk, held_out
from moe_serve.pruning.methods.neurons import loss_root
from moe_serve.pruning.plan import LayerPlan, Refit, RouterFit

TRIAL_TOKENS: Final = 16_384
"""Tokens of a trial, those it is measured on included."""
_MEASURED: Final = 0.25
"""Share of a trial's sequences that measure."""
_LOGIT_TOKENS: Final = 1024
_PIECES: Final = 8
"""Of each domain, at least."""
_SHORTEST: Final = 128
"""Tokens of a piece, at least."""
_STATES: Final = "trial-states"


class Measured(NamedTuple):
    """KL(original‖pruned) in nats per token on held-out calibration tokens."""

    mean: float
    """Over domains, as their balance weighs them."""
    worst: float
    """Of the domain that fares worst."""
    domains: dict[str, float]
    """Each domain's."""


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
    """Every option's error on held-out tokens after compensation, in the loss's metric; mean over
    domains of the mean over tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Where plans are tried."""

    checkpoint: Checkpoint
    sequences: Sequences
    """All calibration sequences; a trial takes an even share of each domain."""
    folder: Path
    """For files: the hidden states of a walk, the original's of all layers."""
    device: torch.device
    batch_tokens: int
    progress: Progress = field(default_factory=Silent)
    """Told about every layer of every trial."""

    def measure(
        self,
        layers: dict[int, LayerPlan],
        refit: Refit | None,
        router: RouterFit | None = None,
    ) -> Measured:
        """Apply some layers' plans in memory, then compare.

        Cost: about three forward passes over :data:`TRIAL_TOKENS` tokens, and the re-fits.
        """
        sequences = trial_share(self.sequences)
        measured_T = held_out(sequences, _MEASURED)
        return self._compare(sequences, measured_T, layers, refit, router, self._trace(sequences))

    def compare(
        self,
        sequences: Sequences,
        measured_T: torch.Tensor,
        layers: dict[int, LayerPlan],
        refit: Refit | None,
        router: RouterFit | None = None,
    ) -> Measured:
        """Apply some layers' plans in memory on some sequences; compare where the mask says so.

        Masked tokens take no part in any fit.
        """
        return self._compare(sequences, measured_T, layers, refit, router, None)

    @torch.inference_mode()
    def _compare(
        self,
        sequences: Sequences,
        measured_T: torch.Tensor,
        layers: dict[int, LayerPlan],
        refit: Refit | None,
        router: RouterFit | None,
        trace: Trace | None,
    ) -> Measured:
        with self._ground(sequences, measured_T, layers, refit, trace) as ground:
            walk, decoder = ground.walk, ground.decoder
            self.progress.start("try a plan", decoder.layers)
            for index in range(decoder.layers):
                layer = decoder.layer(index)
                if layer.mixture is None or index not in layers:
                    walk.pass_through(layer)
                else:
                    walk.fit(layer, layer.mixture, layers[index], refit, router)
                self.progress.advance()
            return ground.measured(decoder.head())

    @torch.inference_mode()
    def pick(
        self,
        changed: Collection[int],
        options: Callable[[int], list[Option]],
        metric: Callable[[int], LayerGradients],
        refit: Refit | None,
    ) -> tuple[dict[int, Pick], Measured]:
        """Take the option of least held-out error in each layer, one after the other.

        Each layer sees the inputs that the options taken below it leave. Ties go to the first.
        The others are weighed with the first one's λ; one that leads with it gets its own.

        Args:
            changed: layers to choose for.
            options: a layer's, the first being the one to beat.
            metric: what the loss feels at a layer's output.
            refit: how each option is compensated.

        Returns:
            What was taken, by layer, and what all of it does to the model.
        """
        picks: dict[int, Pick] = {}
        sequences = trial_share(self.sequences)
        measured_T, trace = held_out(sequences, _MEASURED), self._trace(sequences)
        with self._ground(sequences, measured_T, changed, refit, trace) as ground:
            walk, decoder = ground.walk, ground.decoder
            self.progress.start("weigh methods", decoder.layers)
            for index in range(decoder.layers):
                self.progress.advance()
                layer = decoder.layer(index)
                if layer.mixture is None or index not in changed:
                    walk.pass_through(layer)
                    continue
                root_DD = loss_root(metric(index)).to(self.device)
                walk.meet(layer, layer.mixture)
                picks[index] = _pick(ground, layer, layer.mixture, options(index), root_DD, refit)
                walk.advance(layer)
            return picks, ground.measured(decoder.head())

    def _trace(self, sequences: Sequences) -> Trace:
        """The original's states, which the first trial leaves to those after it."""
        shape = self.checkpoint.shape
        return Trace.kept(
            self.folder / _STATES,
            layers=shape.layers,
            hidden=shape.hidden,
            tokens=sequences.total,
        )

    @contextmanager
    def _ground(
        self,
        sequences: Sequences,
        measured_T: torch.Tensor,
        changed: Collection[int],
        refit: Refit | None,
        trace: Trace | None,
    ) -> Iterator[_Ground]:
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
            held_T=held_out(sequences, (refit or Refit()).holdout) & ~measured_T,
        )
        decoder = Decoder(self.checkpoint, self.device)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="trial-") as folder:
            place, hidden = Path(folder), self.checkpoint.shape.hidden
            trace = trace or Trace.passing(place, layers=decoder.layers, hidden=hidden)
            trace.states[0].path.parent.mkdir(exist_ok=True)
            first = min(changed, default=decoder.layers)
            walk = Walk(decoder, sequences, tokens, place, trace, first=first)
            walk.begin()
            yield _Ground(
                decoder=decoder,
                walk=walk,
                tokens=tokens,
                measured_T=measured_T,
                sequences=sequences,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ground:
    """One trial's walk and the tokens that measure."""

    decoder: Decoder
    walk: Walk
    tokens: FitTokens
    measured_T: torch.Tensor
    sequences: Sequences

    @property
    def parts(self) -> dict[str, float]:
        """Domains that weigh something and have tokens that measure, with their weights."""
        domains = self.sequences.domains
        weights = self.sequences.balance or (1.0,) * len(domains)
        present = set(self.sequences.token_domains()[self.measured_T].tolist())
        pairs = enumerate(zip(domains, weights, strict=True))
        return {name: weight for d, (name, weight) in pairs if weight and d in present}

    def by_domain(self, value_t: torch.Tensor) -> dict[str, float]:
        """Mean over each domain's measured tokens."""
        domain_t = self.sequences.token_domains()[self.measured_T]
        return {
            name: float(value_t[domain_t == d].mean())
            for d, name in enumerate(self.sequences.domains)
            if bool((domain_t == d).any())
        }

    def balanced(self, means: dict[str, float]) -> float:
        """Mean over domains, as they weigh."""
        total = sum(means[name] * weight for name, weight in self.parts.items())
        return total / sum(self.parts.values())

    def measured(self, head: OutputHead) -> Measured:
        """What both streams differ in at the end of the model."""
        device = self.decoder.device
        means = self.by_domain(_divergence(head, self.walk.last(), self.measured_T, device))
        return Measured(self.balanced(means), max(means[name] for name in self.parts), means)

    def error(self, root_DD: torch.Tensor) -> float:
        """What the layer attempted last lacks on the measured tokens, in the loss's metric."""
        found = []
        for batch in self.tokens.batches:
            lacking_TD = batch.load_flat(self.walk.residual)[self.measured_T[batch.tokens]]
            found.append((lacking_TD @ root_DD).square().sum(dim=1).double().cpu())
        return self.balanced(self.by_domain(torch.cat(found)))


def _pick(
    ground: _Ground,
    layer: Layer,
    mixture: Mixture,
    offered: list[Option],
    root_DD: torch.Tensor,
    refit: Refit | None,
) -> Pick:
    """The option that leaves the least error in a layer; the walk then stands where it leads."""
    walk, errors = ground.walk, {}

    def attempt(option: Option, by: Refit | None) -> FittedLayer:
        fitted = walk.attempt(layer, mixture, option.plan, by)
        errors[option.name] = ground.error(root_DD)
        return fitted

    taken, *others = offered
    first = attempt(taken, refit)
    walk.keep()
    same = refit and refit.model_copy(update={"ridges": (first.record["ridge"],)})
    for option in others:
        attempt(option, same)
        if refit and errors[option.name] < errors[taken.name]:
            attempt(option, refit)
        if errors[option.name] < errors[taken.name]:
            taken = option
            walk.keep()
    walk.recall()
    return Pick(name=taken.name, plan=taken.plan, errors=errors)


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


def _divergence(
    head: OutputHead,
    ends: tuple[States, States],
    measured_T: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    """KL of each measured token [t], FP64."""
    found = []
    for positions in torch.nonzero(measured_T).squeeze(1).split(_LOGIT_TOKENS):
        first, last = int(positions[0]), int(positions[-1]) + 1
        logs = [
            torch.log_softmax(head(s.read(first, last - first)[positions - first].to(device)), -1)
            for s in ends
        ]
        found.append((logs[0].exp() * (logs[0] - logs[1])).sum(dim=-1).double().cpu())
    return torch.cat(found)
