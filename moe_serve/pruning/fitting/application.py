"""Carrying out a plan: build every changed layer, re-fit it, write it in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_serve.calibration.decoder import Decoder
from moe_serve.calibration.mixture import read_mixture
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.stream import batches
from moe_serve.calibration.trace import Trace
from moe_serve.checkpoint.form import Form
from moe_serve.checkpoint.shards import ShardWriter
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.staging import Staging
from moe_serve.progress import Progress
from moe_serve.pruning.fitting.build import build_blocks
from moe_serve.pruning.fitting.drafts import with_drafts, write_drafts
from moe_serve.pruning.fitting.refit import FitTokens
from moe_serve.pruning.fitting.walk import FittedLayer, Walk
from moe_serve.pruning.plan import Heal, Plan, Refit

_COPY = "apply/copy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Application:
    """What applying a plan needs besides the plan."""

    checkpoint: Checkpoint
    form: Form
    writer: ShardWriter
    staging: Staging
    device: torch.device
    batch_tokens: int
    progress: Progress


@torch.inference_mode()
def apply_plan(app: Application, plan: Plan, sequences: Sequences | None) -> dict[str, Any] | None:
    """Write all tensors; return what the re-fit did per layer, or ``None`` without one.

    With a re-fit the layers are streamed once more with two hidden states per token, the
    original's and the pruned model's, so that each layer also makes up for what the layers before
    it lost. Every decoder weight is read once for that, and once to be copied.

    Peak memory: one layer in FP32, its kept part again, one normal matrix of side
    ``plan.refit.side`` in FP64 (three times while solving), and one batch.
    """
    if app.staging.done(_COPY) is None:
        app.form.copy_unchanged(app.writer)
        app.writer.sync()
        app.staging.finish(_COPY)
    if plan.needs_texts and sequences is not None:
        return _stream(app, plan, sequences)
    app.progress.start("apply", len(plan.layers))
    for index, layer in sorted(plan.layers.items()):
        if app.staging.done(_step(index)) is None:
            # No name holds a layer's experts while the next one's are read.
            blocks = build_blocks(
                app.checkpoint, index, layer, read_mixture(app.checkpoint, index, app.device).units
            )
            _finish(app, index, FittedLayer(blocks=blocks, rows_ND=None, record={}))
            del blocks
        app.progress.advance()
    return None


def _step(layer: int) -> str:
    return f"apply/{layer}"


def _finish(app: Application, index: int, layer: FittedLayer | None) -> None:
    """Bring a layer to the disk, then say so."""
    if layer is not None:
        app.form.write_layer(app.writer, index, layer.blocks)
        if layer.shared is not None:
            app.form.write_shared(app.writer, index, layer.shared)
        if layer.rows_ND is not None:
            app.form.write_router(app.writer, index, layer.rows_ND)
        app.writer.sync()
    app.staging.finish(_step(index), layer.record if layer else {})


def _drafted(
    app: Application,
    decoder: Decoder,
    sequences: Sequences,
    held_T: torch.Tensor,
    settings: Heal,
) -> Sequences:
    """The calibration tokens and drafts of those that are not held out."""
    offsets = sequences.offsets
    numbers = [n for n, start in enumerate(offsets) if not bool(held_T[start])]
    if app.staging.done(_step(0)) is not None:
        # Past the embedding only their number and lengths matter: the states are on the disk.
        drafts = [sequences.tokens[n] for n in numbers] * settings.rounds * settings.drafts
    else:
        drafts = write_drafts(
            decoder,
            sequences,
            numbers,
            settings,
            app.staging.work,
            app.batch_tokens,
            app.progress,
        )
    return with_drafts(sequences, numbers, drafts)


def _stream(app: Application, plan: Plan, sequences: Sequences) -> dict[str, Any]:
    decoder = Decoder(app.checkpoint, app.device)
    held_T = sequences.held_out((plan.refit or Refit()).holdout)
    if plan.heal is not None:
        sequences = _drafted(app, decoder, sequences, held_T, plan.heal)
        drafts = sequences.total - len(held_T)
        held_T = torch.cat([held_T, torch.zeros(drafts, dtype=torch.bool)])
    tokens = FitTokens(
        batches=tuple(batches(sequences, app.batch_tokens, app.device)),
        omega_T=sequences.weights(),
        held_T=held_T,
    )
    layers, hidden, work = decoder.layers, app.checkpoint.shape.hidden, app.staging.work
    trace = Trace.kept(work, layers=layers, hidden=hidden, tokens=sequences.total)
    if not trace.known:
        trace = Trace.passing(work, layers=layers, hidden=hidden)
    walk = Walk(decoder, sequences, tokens, work, trace, first=min(plan.layers, default=layers))
    app.progress.start("apply", decoder.layers)
    for index in range(decoder.layers):
        if app.staging.done(_step(index)) is None:
            if index == 0:
                walk.begin()
            layer = decoder.layer(index, ahead=index + 1)
            planned = plan.layers.get(index)
            if planned is None or layer.mixture is None:
                walk.pass_through(layer)
                _finish(app, index, None)
            else:
                _finish(
                    app,
                    index,
                    walk.fit(layer, layer.mixture, planned, plan.refit, plan.router, plan.heal),
                )
            del layer  # Freed before the next one is read.
        app.progress.advance()
    walk.end()
    return {
        str(index): app.staging.done(_step(index))
        for index in sorted(plan.layers)
        if app.staging.done(_step(index))
    }
