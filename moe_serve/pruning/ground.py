"""The ground a trial stands on: a walk over some tokens, its steps, and what it is measured by.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from moe_serve.calibration.decoder import Decoder, Layer, OutputHead
from moe_serve.calibration.mixture import Mixture
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.states import States
from moe_serve.checkpoint.staging import Staging
from moe_serve.files import writing
from moe_serve.progress import Progress
from moe_serve.pruning.fitting.refit import FitTokens
from moe_serve.pruning.fitting.walk import Walk

_LOGIT_TOKENS: Final = 1024


class Measured(NamedTuple):
    """KL(original‖pruned) in nats per token on held-out calibration tokens."""

    mean: float
    """Over domains, as their balance weighs them."""
    worst: float
    """Of the domain that fares worst."""
    domains: dict[str, float]
    """Each domain's."""


class Steps:
    """A walk's layers, each taken once by whichever process, and its outcome."""

    def __init__(self, name: str, place: Path, staging: Staging | None, progress: Progress) -> None:
        """Begin, or go on where a process was killed.

        Args:
            name: of the walk.
            place: its folder.
            staging: remembers what is done; ``None``: nothing is.
            progress: told about every layer.
        """
        self._name, self._place, self._staging = f"trial/{name}", place, staging
        self.progress = progress
        with writing(place):
            if self.outcome is None:
                place.mkdir(exist_ok=True)
            elif place.exists():
                shutil.rmtree(place)  # The process died between the two halves of end().

    @property
    def outcome(self) -> Any:
        """What :meth:`end` has recorded."""
        return self._staging.done(self._name) if self._staging else None

    def said(self, index: int) -> Any:
        """What a layer's step has recorded; ``None`` where it is still to do."""
        return self._staging.done(f"{self._name}/{index}") if self._staging else None

    def finish(self, index: int, found: object) -> None:
        """Record a layer's step, whose hidden states are in their files."""
        if self._staging is not None:
            self._staging.finish(f"{self._name}/{index}", found)

    def end(self, outcome: object) -> None:
        """Record the outcome; the walk's files go."""
        if self._staging is not None:
            self._staging.finish(self._name, outcome)
        shutil.rmtree(self._place)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ground:
    """One trial's walk and the tokens that measure."""

    decoder: Decoder
    walk: Walk
    steps: Steps
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

    def measured(self) -> Measured:
        """What both streams differ in at the end of the model; the walk is then over."""
        if (found := self.steps.outcome) is not None:
            return Measured(**found)
        device, head = self.decoder.device, self.decoder.head()
        means = self.by_domain(_divergence(head, self.walk.last(), self.measured_T, device))
        found = Measured(self.balanced(means), max(means[name] for name in self.parts), means)
        self.steps.end(found._asdict())
        return found

    def each(self, step: Callable[[Layer], object]) -> None:
        """Take the steps that are left, from the first layer up."""
        for index in range(self.decoder.layers):
            if self.steps.said(index) is None:
                if index == 0:
                    self.walk.begin()
                self.steps.finish(index, step(self.decoder.layer(index)))
            self.steps.progress.advance()

    def error(self, root_DD: torch.Tensor, pruned: Mixture | None = None) -> float:
        """What a layer lacks on the measured tokens, in the loss's metric.

        Args:
            root_DD: of the metric.
            pruned: the layer; ``None``: the one attempted last, as its fits have left it.
        """
        found = []
        for batch in self.tokens.batches:
            some_T = self.measured_T[batch.tokens]
            lacking_tD = (
                batch.load_flat(self.walk.residual)[some_T]
                if pruned is None
                else self.walk.lack(pruned, batch, some_T)
            )
            found.append((lacking_tD @ root_DD).square().sum(dim=1).double().cpu())
        return self.balanced(self.by_domain(torch.cat(found)))


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
        original_TD, pruned_TD = (
            s.read(first, last - first)[positions - first].to(device) for s in ends
        )
        found.append(head.divergence(original_TD, pruned_TD).double().cpu())
    return torch.cat(found)
