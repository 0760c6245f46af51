"""The calibration pass: every layer once, every criterion from the same forward."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeVar

import torch

from moe_serve.calibration.decoder import Decoder
from moe_serve.calibration.gradients import LayerGradients
from moe_serve.calibration.group import Group
from moe_serve.calibration.reverse import LayerInputs, ReversePass
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.states import States
from moe_serve.calibration.statistics import Accumulator, LayerStatistics
from moe_serve.calibration.store import (
    CalibrationRecord,
    Statistics,
    StatisticsWriter,
)
from moe_serve.calibration.stream import Batch, batches, embed
from moe_serve.calibration.trace import Trace
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.staging import Staging, require_space
from moe_serve.errors import UsageError, located
from moe_serve.progress import Progress

RESERVOIR: Final = 1024
"""Tokens per layer kept for criteria that need all experts on the same inputs."""
_DONE: Final = "calibrate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Collection:
    """Settings of a calibration pass that do not change its result beyond float noise."""

    device: torch.device
    batch_tokens: int = 4096
    group: Group = field(default_factory=Group)
    """Who shares the work."""
    keep_states: bool = False
    """Whether every layer's hidden states stay in the work folder (:meth:`Trace.kept`)."""


def collect(
    checkpoint: Checkpoint,
    sequences: Sequences,
    record: CalibrationRecord,
    folder: Path,
    staging: Staging,
    settings: Collection,
    progress: Progress,
) -> Statistics:
    """Stream all layers and write ``statistics.safetensors`` and ``statistics.json``.

    Reads every weight of the decoder twice: forward, and back for the gradients if the record
    wants them. Peak memory: one
    layer in FP32, its normal matrices (N · I² · 4 bytes) and one batch; hidden states stay on disk.

    Args:
        checkpoint: an uncompacted checkpoint.
        sequences: the calibration tokens.
        record: what to say about them.
        folder: where the statistics go; exists.
        staging: journal that makes the pass resumable layer by layer.
        settings: device and batch size.
        progress: told about every layer.

    Raises:
        UsageError: the checkpoint is already pruned.
        OutputError: the disk has no room for the hidden states.
        CheckpointError: weights are missing, misshapen or not finite.
        CalibrationError: activations are not finite.
    """
    observe(checkpoint, sequences, record, folder, staging, settings, progress)
    return Statistics(folder)


def observe(
    checkpoint: Checkpoint,
    sequences: Sequences,
    record: CalibrationRecord,
    folder: Path,
    staging: Staging,
    settings: Collection,
    progress: Progress,
) -> None:
    """What :func:`collect` does, by each process of a group on its part of the record's share.

    Every process brings a work folder of its own; the first one writes the statistics. A step
    counts as done when all have recorded it: they wait for one another after each, so whoever is
    ahead by one still has the inputs to repeat it.
    """
    if checkpoint.is_pruned:
        raise UsageError(
            "is already pruned", where=str(checkpoint.path), remedy="calibrate the original"
        )
    group = settings.group
    if group.any(staging.done(_DONE) is not None):
        return
    numbers = record.share.part(group.rank, group.size).numbers(len(sequences.tokens))
    ours = sequences.share(numbers)
    writer = StatisticsWriter(folder, checkpoint, record) if group.rank == 0 else None
    decoder = Decoder(checkpoint, settings.device)
    hidden, layers = checkpoint.shape.hidden, decoder.layers
    inputs = LayerInputs.of(
        sequences, numbers, staging, limit=record.gradients, layers=layers, hidden=hidden
    )
    trace = (
        Trace.kept(staging.work, layers=layers, hidden=hidden, tokens=ours.total)
        if settings.keep_states
        else Trace.passing(staging.work, layers=layers, hidden=hidden)
    )
    if staging.done("calibrate/0") is None:
        kept = inputs.bytes_needed if record.gradients else 0
        require_space(staging.path, kept + trace.size(ours.total))
    progress.start("calibrate", (2 if record.gradients else 1) * layers)
    forward = _Forward(
        decoder=decoder,
        sequences=ours,
        states=trace.states,
        sample=_sample(sequences, numbers, record),
        reservoir=record.reservoir,
        inputs=inputs if record.gradients else None,
        settings=settings,
    )
    steps = _Steps(group=group, staging=staging, progress=progress)
    steps.take("calibrate", range(layers), forward.step, writer.write if writer else None)
    reverse = ReversePass(decoder, inputs, staging, settings.batch_tokens)

    def back(index: int) -> LayerGradients | None:
        if index == layers - 1:
            reverse.begin()
        return reverse.step(index)

    if record.gradients:
        write = writer.write_gradients if writer else None
        steps.take("reverse", reversed(range(layers)), back, write)
    if writer is not None:
        writer.close()
    staging.finish(_DONE)
    group.all(mine=True)  # The first process has recorded the end before another forgets its part.
    if not settings.keep_states:
        trace.remove()
    inputs.remove()
    reverse.end()


class _Sums(Protocol):
    """What adds up over the processes of a group."""

    def tensors(self) -> dict[str, torch.Tensor]: ...


_Found = TypeVar("_Found", bound=_Sums)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Steps:
    """One step per layer, each taken once by the whole group and recorded."""

    group: Group
    staging: Staging
    progress: Progress

    def take(
        self,
        name: str,
        layers: Iterable[int],
        step: Callable[[int], _Found | None],
        store: Callable[[int, _Found], None] | None,
    ) -> None:
        for index in layers:
            key = f"{name}/{index}"
            if not self.group.all(self.staging.done(key) is not None):
                with located(f"layer {index}"):
                    found = step(index)
                if found is not None:
                    self.group.sum(found.tensors().values())
                    if store is not None:
                        store(index, found)
                self.staging.finish(key)
            self.progress.advance()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Forward:
    """The forward half, one layer per step."""

    decoder: Decoder
    sequences: Sequences
    states: tuple[States, ...]
    """At each layer's entrance, and at the end."""
    sample: dict[int, int]
    """Position among our tokens → row of the reservoir."""
    reservoir: int
    inputs: LayerInputs | None
    """What the reverse pass will want."""
    settings: Collection

    @torch.inference_mode()
    def step(self, index: int) -> LayerStatistics | None:
        """Push all tokens through a layer; its statistics, or ``None`` where it is dense."""
        shape, device = self.decoder.checkpoint.shape, self.settings.device
        before, after = self.states[index : index + 2]
        if index == 0:
            embed(self.decoder, self.sequences, before)
        layer = self.decoder.layer(index, ahead=index + 1)
        domain_T, omega_T = self.sequences.token_domains(), self.sequences.weights()
        accumulator = Accumulator(
            domains=len(self.sequences.domains),
            experts=shape.experts,
            width=shape.width,
            hidden=shape.hidden,
            reservoir=self.reservoir,
            device=device,
        )
        last = index == self.decoder.layers - 1
        for batch in batches(self.sequences, self.settings.batch_tokens, device):
            x_BLD = batch.load(before)
            if self.inputs is not None:
                self.inputs.keep(index, batch, x_BLD)
            r_BLD = layer.attend(x_BLD, self.decoder.rotary(*batch.shape))
            z_BLD = layer.normed(r_BLD)
            if layer.mixture is None:
                y_BLD = layer.feed_forward(z_BLD)
            else:
                y_BLD = accumulator.observe(
                    layer.mixture,
                    z_BLD.flatten(0, 1),
                    domain_T[batch.tokens].to(device),
                    omega_T[batch.tokens].to(device),
                    _within(self.sample, batch),
                ).view_as(r_BLD)
            x_BLD = r_BLD + y_BLD
            batch.store(after, x_BLD)
            if last and self.inputs is not None:
                self.inputs.keep(index + 1, batch, x_BLD)
        return accumulator.result() if layer.mixture is not None else None


def _sample(corpus: Sequences, numbers: range, record: CalibrationRecord) -> dict[int, int]:
    """The reservoir's tokens among ours, and the row of each.

    The sample is drawn from the whole corpus, so it is the same for any batch size and any number
    of shards.
    """
    drawn = _drawn(corpus, record)
    rows = {position: row for row, position in enumerate(sorted(drawn))}
    offsets = corpus.offsets
    found, ahead = {}, 0
    for number in numbers:
        start, length = offsets[number], len(corpus.tokens[number])
        for position in range(start, start + length):
            if position in rows:
                found[ahead + position - start] = rows[position]
        ahead += length
    return found


def _drawn(corpus: Sequences, record: CalibrationRecord) -> list[int]:
    """Positions of the reservoir's tokens: any, or as many of each domain as the balance says."""
    generator = random.Random(f"{record.seed}/reservoir")
    if not record.sample:
        return generator.sample(range(corpus.total), record.reservoir)
    domain_T = corpus.token_domains()
    drawn: list[int] = []
    for number, count in enumerate(record.sample):
        drawn += generator.sample(torch.nonzero(domain_T == number).squeeze(1).tolist(), count)
    return drawn


def _within(sample: dict[int, int], batch: Batch) -> dict[int, int]:
    first, last = batch.tokens.start, batch.tokens.stop
    return {at - first: row for at, row in sample.items() if first <= at < last}
