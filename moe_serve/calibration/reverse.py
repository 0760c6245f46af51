"""The reverse pass: the loss's gradient at every mixture's output, last layer first.

The forward pass has left each layer's inputs on disk, so one layer is resident at a time: its
forward again, one vector-Jacobian product, and the gradient moves on to the layer below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from moe_serve.calibration.decoder import Decoder
from moe_serve.calibration.gradients import GradientSums, LayerGradients
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch, batches
from moe_serve.checkpoint.staging import Staging

_LOGITS: Final = 2**26
"""Logits in memory at once."""


def share_of(sequences: Sequences, limit: int) -> tuple[int, ...]:
    """Each domain's first sequences, ``limit`` tokens in all; one sequence per domain at least."""
    per_domain = limit // len(sequences.domains)
    used = dict.fromkeys(range(len(sequences.domains)), 0)
    chosen = []
    for number, (tokens, domain) in enumerate(zip(sequences.tokens, sequences.domain, strict=True)):
        if used[domain] == 0 or used[domain] + len(tokens) <= per_domain:
            used[domain] += len(tokens)
            chosen.append(number)
    return tuple(chosen)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerInputs:
    """The inputs of every layer, and the last one's output, for the tokens that take part."""

    sequences: Sequences
    """Only those that take part."""
    states: tuple[States, ...]
    place: dict[int, int]
    """Number among the sequences observed here → position of its first token in ``states``."""

    @classmethod
    def of(
        cls,
        corpus: Sequences,
        numbers: range,
        staging: Staging,
        *,
        limit: int,
        layers: int,
        hidden: int,
    ) -> LayerInputs:
        """Choose the tokens among the whole corpus, keep ours; nothing is written yet.

        Args:
            corpus: all sequences.
            numbers: which of them this process observes.
            staging: its work folder holds the files.
            limit: tokens of the whole corpus that take part at most.
            layers: decoder layers.
            hidden: D.
        """
        chosen = share_of(corpus, limit)
        ours = [position for position, number in enumerate(chosen) if number in numbers]
        part = corpus.subset(chosen).share(ours)
        own_numbers = (numbers.index(chosen[position]) for position in ours)
        files = (staging.work / f"reverse-input-{i}.f32" for i in range(layers + 1))
        return cls(
            sequences=part,
            states=tuple(States(file, hidden) for file in files),
            place=dict(zip(own_numbers, part.offsets, strict=True)),
        )

    @property
    def bytes_needed(self) -> int:
        """On disk, with the two files of gradients."""
        return (len(self.states) + 2) * self.states[0].size(self.sequences.total)

    def keep(self, layer: int, batch: Batch, x_BLD: torch.Tensor) -> None:
        """Store those rows of a layer's input batch that take part."""
        for number, x_LD in zip(batch.sequences, x_BLD, strict=True):
            if number in self.place:
                self.states[layer].write(self.place[number], x_LD)

    def remove(self) -> None:
        """Delete the files."""
        for states in self.states:
            states.remove()


class ReversePass:
    """Walks from the loss down to the first layer, one layer per :meth:`step`."""

    def __init__(
        self, decoder: Decoder, inputs: LayerInputs, staging: Staging, batch_tokens: int
    ) -> None:
        """Prepare; nothing is computed yet."""
        hidden = decoder.checkpoint.shape.hidden
        files = (staging.work / f"reverse-gradient-{i}.f32" for i in (0, 1))
        self._gradients = tuple(States(file, hidden) for file in files)
        self._decoder = decoder
        self._inputs = inputs
        self._omega_T = inputs.sequences.weights()
        self._batches = tuple(batches(inputs.sequences, batch_tokens, decoder.device))
        checkpoint = decoder.checkpoint
        self._lowest = min(checkpoint.family.moe_layers(checkpoint.config))

    @torch.inference_mode(mode=False)
    def begin(self) -> None:
        """The gradient of each sequence's summed negative log-likelihood at the last output."""
        head = self._decoder.head()
        sequences, device = self._inputs.sequences, self._decoder.device
        final, into = self._inputs.states[-1], self._gradients[self._decoder.layers % 2]
        rows = max(1, _LOGITS // len(head.weight_VD))
        for tokens, start in zip(sequences.tokens, sequences.offsets, strict=True):
            ids_T = torch.from_numpy(np.ascontiguousarray(tokens)).to(device)
            for at in range(0, len(ids_T), rows):
                x_TD = final.read(start + at, min(rows, len(ids_T) - at)).to(device)
                next_T = ids_T[at + 1 : at + 1 + len(x_TD)]
                with torch.enable_grad():
                    x_TD.requires_grad_()
                    loss = torch.nn.functional.cross_entropy(
                        head(x_TD[: len(next_T)]), next_T, reduction="sum"
                    )
                    (g_TD,) = torch.autograd.grad(loss, x_TD)
                into.write(start + at, g_TD)

    @torch.inference_mode(mode=False)
    def step(self, index: int) -> LayerGradients | None:
        """Move the gradient below layer ``index``; its sums, or ``None`` where it is dense.

        The lowest mixture is as far as it goes: no sum wants what is felt below.
        """
        if index < self._lowest:
            return None
        onwards = index > self._lowest
        layer = self._decoder.layer(index, ahead=index - 1 if onwards else None)
        shape = self._decoder.checkpoint.shape
        above, below = self._gradients[(index + 1) % 2], self._gradients[index % 2]
        sums = GradientSums(experts=shape.experts, width=shape.width, hidden=shape.hidden)
        for batch in self._batches:
            g_BLD = batch.load(above)
            with torch.set_grad_enabled(onwards):
                x_BLD = batch.load(self._inputs.states[index]).requires_grad_(onwards)
                r_BLD = layer.attend(x_BLD, self._decoder.rotary(*batch.shape))
                z_BLD = layer.normed(r_BLD)
                if layer.mixture is None:
                    ends, heads = [r_BLD + layer.feed_forward(z_BLD)], [g_BLD]
                else:
                    omega_T = self._omega_T[batch.tokens].to(self._decoder.device)
                    z_TD, g_TD = z_BLD.detach().flatten(0, 1), g_BLD.flatten(0, 1)
                    dz_TD = sums.observe(layer.mixture, z_TD, g_TD, omega_T)
                    ends, heads = [r_BLD, z_BLD], [g_BLD, dz_TD.view_as(z_BLD)]
                if onwards:
                    (down_BLD,) = torch.autograd.grad(ends, x_BLD, heads)
                    batch.store(below, down_BLD)
        return sums.result() if layer.mixture is not None else None

    def end(self) -> None:
        """Remove the gradients."""
        for states in self._gradients:
            states.remove()
