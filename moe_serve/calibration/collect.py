"""The calibration pass: every layer once, every criterion from the same forward."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from moe_serve.calibration.decoder import Decoder
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.states import States
from moe_serve.calibration.statistics import Accumulator
from moe_serve.calibration.store import (
    CalibrationRecord,
    Statistics,
    StatisticsWriter,
)
from moe_serve.calibration.stream import Batch, batches, embed
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.staging import Staging
from moe_serve.errors import UsageError
from moe_serve.progress import Progress

RESERVOIR: Final = 512
"""Tokens per layer kept for criteria that need all experts on the same inputs."""
_STEP: Final = "calibrate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Collection:
    """Settings of a calibration pass that do not change its result beyond float noise."""

    device: torch.device
    batch_tokens: int = 4096


@torch.inference_mode()
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

    Reads every weight of the decoder once. Peak memory: one layer in FP32, its normal matrices
    (N · I² · 4 bytes) and one batch; hidden states stay on disk.

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
        CheckpointError: weights are missing, misshapen or not finite.
        CalibrationError: activations are not finite.
    """
    if checkpoint.is_compact:
        raise UsageError(
            "is already compact", where=str(checkpoint.path), remedy="calibrate the original"
        )
    writer = StatisticsWriter(folder, checkpoint, record)
    decoder = Decoder(checkpoint, settings.device)
    hidden = checkpoint.shape.hidden
    domain_T, omega_T = sequences.token_domains(), sequences.weights()
    sample = _reservoir(sequences.total, record.reservoir, record.seed)
    layers = decoder.layers
    progress.start("calibrate", layers)
    states = [States(staging.work / f"calibrate-{i}.f32", hidden) for i in (0, 1)]
    for index in range(layers):
        step = f"{_STEP}/{index}"
        if staging.done(step) is None:
            before, after = states[index % 2], states[(index + 1) % 2]
            if index == 0:
                embed(decoder, sequences, before)
            layer = decoder.layer(index)
            mixture = layer.mixture
            accumulator = (
                None
                if mixture is None
                else Accumulator(
                    domains=len(sequences.domains),
                    experts=checkpoint.shape.experts,
                    width=checkpoint.shape.width,
                    hidden=hidden,
                )
            )
            for batch in batches(sequences, settings.batch_tokens, settings.device):
                r_BLD = layer.attend(batch.load(before), decoder.rotary(*batch.shape))
                z_BLD = layer.normed(r_BLD)
                if mixture is None or accumulator is None:
                    y_BLD = layer.feed_forward(z_BLD)
                else:
                    y_BLD = accumulator.observe(
                        mixture,
                        z_BLD.flatten(0, 1),
                        domain_T[batch.tokens],
                        omega_T[batch.tokens].to(settings.device),
                        _within(sample, batch),
                    ).view_as(r_BLD)
                batch.store(after, r_BLD + y_BLD)
            if accumulator is not None:
                writer.write(index, accumulator.result())
            staging.finish(step)
        progress.advance()
    if staging.done(_STEP) is None:
        writer.close()
        staging.finish(_STEP)
    for state in states:
        state.remove()
    return Statistics(folder)


def _reservoir(total: int, size: int, seed: int) -> list[int]:
    """A seeded sample of token positions, the same for any batch size, in ascending order."""
    return sorted(random.Random(f"{seed}/reservoir").sample(range(total), min(size, total)))


def _within(sample: list[int], batch: Batch) -> list[int]:
    first, last = batch.tokens.start, batch.tokens.stop
    return [position - first for position in sample if first <= position < last]
