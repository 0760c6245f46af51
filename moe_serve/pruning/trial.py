"""What a plan does to the model, measured on calibration texts kept out of its fit.

Nothing is written but hidden states: the plan is applied and re-fitted in memory, layer by layer,
beside the original, and both ends are compared. A choice between plans, or whether a step is worth
taking, is decided by this, not by a proxy.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch

from moe_serve.calibration.decoder import Decoder, OutputHead
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import batches
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.pruning.plan import LayerPlan, Refit, RouterFit
from moe_serve.pruning.refit import FitTokens
from moe_serve.pruning.walk import Walk, held_out

TRIAL_TOKENS: Final = 16_384
"""Tokens of a trial, those it is measured on included."""
_MEASURED: Final = 0.25
"""Share of a trial's sequences that measure."""
_LOGIT_TOKENS: Final = 1024


class Measured(NamedTuple):
    """KL(original‖pruned) in nats per token on held-out calibration tokens."""

    mean: float
    """Over domains, as their balance weighs them."""
    worst: float
    """Of the domain that fares worst."""
    domains: dict[str, float]
    """Each domain's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """Where plans are tried."""

    checkpoint: Checkpoint
    sequences: Sequences
    """All calibration sequences; a trial takes an even share of each domain."""
    folder: Path
    """For temporary files: six hidden states per token."""
    device: torch.device
    batch_tokens: int

    def measure(
        self,
        layers: dict[int, LayerPlan],
        refit: Refit | None,
        router: RouterFit | None = None,
    ) -> Measured:
        """Apply some layers' plans in memory, then compare.

        Cost: about three forward passes over :data:`TRIAL_TOKENS` tokens, and the re-fits.
        """
        sequences = _share(self.sequences, TRIAL_TOKENS)
        return self.compare(sequences, held_out(sequences, _MEASURED), layers, refit, router)

    @torch.inference_mode()
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
        settings = refit or Refit()
        tokens = FitTokens(
            batches=tuple(batches(sequences, self.batch_tokens, self.device)),
            omega_T=sequences.weights().masked_fill(measured_T, 0.0),
            held_T=held_out(sequences, settings.holdout) & ~measured_T,
        )
        decoder = Decoder(self.checkpoint, self.device)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="trial-") as folder:
            walk = Walk(decoder, sequences, tokens, Path(folder))
            walk.begin()
            for index in range(decoder.layers):
                layer = decoder.layer(index)
                if layer.mixture is None or index not in layers:
                    walk.pass_through(layer)
                else:
                    walk.fit(layer, layer.mixture, layers[index], refit, router)
            kl_T = _divergence(decoder.head(), walk.last(), measured_T, self.device)
        domain_T = sequences.token_domains()[measured_T]
        means = {
            name: float(kl_T[domain_T == d].mean())
            for d, name in enumerate(sequences.domains)
            if bool((domain_T == d).any())
        }
        parts = sequences.balance or (1.0,) * len(sequences.domains)
        part = {n: p for n, p in zip(sequences.domains, parts, strict=True) if p and n in means}
        mean = sum(means[n] * p for n, p in part.items()) / sum(part.values())
        return Measured(mean, max(means[n] for n in part), means)


def _share(sequences: Sequences, tokens: int) -> Sequences:
    """About so many tokens, the same share of every domain's sequences, evenly spaced."""
    every = max(1, round(sequences.total / tokens))
    seen: dict[int, int] = {}
    chosen = []
    for number, domain in enumerate(sequences.domain):
        if seen.setdefault(domain, 0) % every == 0:
            chosen.append(number)
        seen[domain] += 1
    return sequences.subset(chosen)


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
