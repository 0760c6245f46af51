"""The calibration pass: every layer once, every criterion from the same forward."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from moe_serve.calibration.decoder import Decoder
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
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.staging import Staging, require_space
from moe_serve.errors import UsageError
from moe_serve.progress import Progress

RESERVOIR: Final = 1024
"""Tokens per layer kept for criteria that need all experts on the same inputs."""
_DONE: Final = "calibrate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Collection:
    """Settings of a calibration pass that do not change its result beyond float noise."""

    device: torch.device
    batch_tokens: int = 4096


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

    Reads every weight of the decoder twice: forward, and back for the gradients. Peak memory: one
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
        UsageError: the checkpoint is already compact.
        OutputError: the disk has no room for the hidden states.
        CheckpointError: weights are missing, misshapen or not finite.
        CalibrationError: activations are not finite.
    """
    if checkpoint.is_compact:
        raise UsageError(
            "is already compact", where=str(checkpoint.path), remedy="calibrate the original"
        )
    if staging.done(_DONE) is None:
        writer = StatisticsWriter(folder, checkpoint, record)
        decoder = Decoder(checkpoint, settings.device)
        hidden, layers = checkpoint.shape.hidden, decoder.layers
        inputs = LayerInputs.of(sequences, staging, layers=layers, hidden=hidden)
        states = [States(staging.work / f"calibrate-{i}.f32", hidden) for i in (0, 1)]
        if not staging.resumed:
            room = inputs.bytes_needed + 2 * states[0].size(sequences.total)
            require_space(staging.path, room)
        progress.start("calibrate", 2 * layers)
        forward = _Forward(
            decoder=decoder,
            sequences=sequences,
            states=(states[0], states[1]),
            sample=_reservoir(sequences.total, record.reservoir, record.seed),
            inputs=inputs,
            settings=settings,
        )
        for index in range(layers):
            step = f"calibrate/{index}"
            if staging.done(step) is None:
                if (found := forward.step(index)) is not None:
                    writer.write(index, found)
                staging.finish(step)
            progress.advance()
        reverse = ReversePass(decoder, inputs, staging, settings.batch_tokens)
        for index in reversed(range(layers)):
            step = f"reverse/{index}"
            if staging.done(step) is None:
                if index == layers - 1:
                    reverse.begin()
                if (gradients := reverse.step(index)) is not None:
                    writer.write_gradients(index, gradients)
                staging.finish(step)
            progress.advance()
        writer.close()
        staging.finish(_DONE)
        for state in states:
            state.remove()
        inputs.remove()
        reverse.end()
    return Statistics(folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Forward:
    """The forward half, one layer per step."""

    decoder: Decoder
    sequences: Sequences
    states: tuple[States, States]
    sample: list[int]
    inputs: LayerInputs
    settings: Collection

    @torch.inference_mode()
    def step(self, index: int) -> LayerStatistics | None:
        """Push all tokens through a layer; its statistics, or ``None`` where it is dense."""
        shape, device = self.decoder.checkpoint.shape, self.settings.device
        before, after = self.states[index % 2], self.states[(index + 1) % 2]
        if index == 0:
            embed(self.decoder, self.sequences, before)
        layer = self.decoder.layer(index)
        domain_T, omega_T = self.sequences.token_domains(), self.sequences.weights()
        accumulator = Accumulator(
            domains=len(self.sequences.domains),
            experts=shape.experts,
            width=shape.width,
            hidden=shape.hidden,
        )
        last = index == self.decoder.layers - 1
        for batch in batches(self.sequences, self.settings.batch_tokens, device):
            x_BLD = batch.load(before)
            self.inputs.keep(index, batch, x_BLD)
            r_BLD = layer.attend(x_BLD, self.decoder.rotary(*batch.shape))
            z_BLD = layer.normed(r_BLD)
            if layer.mixture is None:
                y_BLD = layer.feed_forward(z_BLD)
            else:
                y_BLD = accumulator.observe(
                    layer.mixture,
                    z_BLD.flatten(0, 1),
                    domain_T[batch.tokens],
                    omega_T[batch.tokens].to(device),
                    _within(self.sample, batch),
                ).view_as(r_BLD)
            x_BLD = r_BLD + y_BLD
            batch.store(after, x_BLD)
            if last:
                self.inputs.keep(index + 1, batch, x_BLD)
        return accumulator.result() if layer.mixture is not None else None


def _reservoir(total: int, size: int, seed: int) -> list[int]:
    """A seeded sample of token positions, the same for any batch size, in ascending order."""
    return sorted(random.Random(f"{seed}/reservoir").sample(range(total), min(size, total)))


def _within(sample: list[int], batch: Batch) -> list[int]:
    first, last = batch.tokens.start, batch.tokens.stop
    return [position - first for position in sample if first <= position < last]
