"""Carrying out a plan: build every changed layer, re-fit it, write it in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_serve.calibration.decoder import Decoder, Layer
from moe_serve.calibration.mixture import Mixture, read_mixture
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch, batches, embed
from moe_serve.checkpoint.formats import Form, LayerBlocks
from moe_serve.checkpoint.shards import ShardWriter
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.staging import Staging
from moe_serve.progress import Progress
from moe_serve.pruning.build import blocks_from_units, expert_dtype, pruned_mixture, with_downs
from moe_serve.pruning.plan import LayerPlan, Plan, Refit
from moe_serve.pruning.refit import FitTokens, refit

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
    if plan.refit is not None and sequences is not None:
        return _stream(app, plan, plan.refit, sequences)
    app.progress.start("apply", len(plan.layers))
    for index, layer in sorted(plan.layers.items()):
        if app.staging.done(_step(index)) is None:
            dtype = expert_dtype(app.checkpoint, index)
            mixture = read_mixture(app.checkpoint, index, app.device)
            _finish(app, index, blocks_from_units(layer, mixture.units, dtype), None)
        app.progress.advance()
    return None


def _step(layer: int) -> str:
    return f"apply/{layer}"


def _finish(
    app: Application, index: int, blocks: LayerBlocks | None, record: dict[str, Any] | None
) -> None:
    """Bring a layer to the disk, then say so."""
    if blocks is not None:
        app.form.write_layer(app.writer, index, blocks)
        app.writer.sync()
    app.staging.finish(_step(index), record or {})


def _stream(app: Application, plan: Plan, settings: Refit, sequences: Sequences) -> dict[str, Any]:
    decoder = Decoder(app.checkpoint, app.device)
    walk = _Walk(app, decoder, sequences, settings)
    app.progress.start("apply", decoder.layers)
    for index in range(decoder.layers):
        if app.staging.done(_step(index)) is None:
            if index == 0:
                walk.begin()
            layer = decoder.layer(index)
            planned = plan.layers.get(index)
            if planned is None or layer.mixture is None:
                walk.pass_through(layer)
                _finish(app, index, None, None)
            else:
                blocks, record = walk.fit(layer, layer.mixture, planned)
                _finish(app, index, blocks, record)
        app.progress.advance()
    walk.end()
    return {
        str(index): app.staging.done(_step(index))
        for index in sorted(plan.layers)
        if app.staging.done(_step(index))
    }


class _Walk:
    """Two streams of hidden states through the layers: the original's and the pruned model's."""

    def __init__(
        self, app: Application, decoder: Decoder, sequences: Sequences, settings: Refit
    ) -> None:
        self._app = app
        self._decoder = decoder
        self._sequences = sequences
        self._settings = settings
        hidden = app.checkpoint.shape.hidden
        folder = app.staging.work

        def states(name: str) -> States:
            return States(folder / f"apply-{name}.f32", hidden)

        self._original = (states("original-0"), states("original-1"))
        self._pruned = (states("pruned-0"), states("pruned-1"))
        self._inputs, self._residual = states("inputs"), states("residual")
        self._tokens = FitTokens(
            batches=tuple(batches(sequences, app.batch_tokens, app.device)),
            omega_T=sequences.weights(),
            held_T=_held_out(sequences, settings.holdout),
        )

    def begin(self) -> None:
        """Both streams start at the embedding."""
        embed(self._decoder, self._sequences, self._original[0])
        embed(self._decoder, self._sequences, self._pruned[0])

    def end(self) -> None:
        """Remove the hidden states."""
        for states in (*self._original, *self._pruned, self._inputs, self._residual):
            states.remove()

    def pass_through(self, layer: Layer) -> None:
        """Run an unchanged layer on both streams."""
        for batch in self._tokens.batches:
            for streams in (self._original, self._pruned):
                r_BLD, z_BLD = self._attend(layer, batch, streams)
                after = streams[(layer.index + 1) % 2]
                batch.store(after, r_BLD + layer.feed_forward(z_BLD))

    def fit(
        self, layer: Layer, mixture: Mixture, planned: LayerPlan
    ) -> tuple[LayerBlocks, dict[str, Any]]:
        """Build and re-fit a changed layer; both streams move on."""
        dtype = expert_dtype(self._app.checkpoint, layer.index)
        table = planned.table()
        blocks = blocks_from_units(planned, mixture.units, dtype)
        pruned = pruned_mixture(mixture, table, blocks)
        original_after = self._original[(layer.index + 1) % 2]
        pruned_after = self._pruned[(layer.index + 1) % 2]
        for batch in self._tokens.batches:
            r_BLD, z_BLD = self._attend(layer, batch, self._original)
            goal_BLD = r_BLD + layer.feed_forward(z_BLD)
            batch.store(original_after, goal_BLD)
            r_BLD, z_BLD = self._attend(layer, batch, self._pruned)
            y_BLD = pruned(z_BLD.flatten(0, 1)).view_as(r_BLD)
            batch.store(self._inputs, z_BLD)
            batch.store(self._residual, goal_BLD - r_BLD - y_BLD)
        fitted = refit(pruned, self._inputs, self._residual, self._tokens, self._settings, dtype)
        for batch in self._tokens.batches:
            # goal - residual is r + P W on the rounded weights: what will be served.
            batch.store(pruned_after, batch.load(original_after) - batch.load(self._residual))
        record = {
            "ridge": fitted.ridge,
            "error_before": fitted.error_before,
            "error_after": fitted.error_after,
        }
        return with_downs(blocks, table, fitted.units, dtype), record

    def _attend(
        self, layer: Layer, batch: Batch, streams: tuple[States, States]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_BLD = batch.load(streams[layer.index % 2])
        r_BLD = layer.attend(x_BLD, self._decoder.rotary(*batch.shape))
        return r_BLD, layer.normed(r_BLD)


def _held_out(sequences: Sequences, share: float) -> torch.Tensor:
    """Every n-th sequence of each domain, as a mask over tokens."""
    every = max(2, round(1 / share))
    seen: dict[int, int] = {}
    parts = []
    for tokens, domain in zip(sequences.tokens, sequences.domain, strict=True):
        number = seen.get(domain, 0)
        seen[domain] = number + 1
        parts.append(torch.full((len(tokens),), number % every == every - 1))
    return torch.cat(parts)
