"""Two streams of hidden states through the layers, so that each layer fits what is left to fit.

Shape suffixes: B sequences, L tokens each, D hidden size, T tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_serve.calibration.decoder import Decoder, Layer
from moe_serve.calibration.mixture import Mixture
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch, embed
from moe_serve.checkpoint.formats import LayerBlocks
from moe_serve.checkpoint.quantisation import Matrix
from moe_serve.checkpoint.table import LayerTable
from moe_serve.pruning.build import build_blocks, pruned_mixture, with_downs, with_units
from moe_serve.pruning.constants import ConstantSums, with_constants
from moe_serve.pruning.heal import apart, heal
from moe_serve.pruning.joining import join_rows
from moe_serve.pruning.plan import Heal, LayerPlan, Refit, RouterFit
from moe_serve.pruning.refit import FitTokens, refit
from moe_serve.pruning.router import fit_rows
from moe_serve.pruning.shared import shared_down, split_shared, with_shared
from moe_serve.pruning.split import split_layer


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedLayer:
    """A changed layer, to be written."""

    blocks: LayerBlocks
    rows_ND: torch.Tensor | None
    """The router's rows in their stored format, where they changed."""
    shared: Matrix | None = None
    """The shared expert's down projection in its stored format, where it changed."""
    record: dict[str, Any]
    """What the re-fits did."""


class Walk:
    """Two streams of hidden states through the layers: the original's and the pruned model's."""

    def __init__(
        self, decoder: Decoder, sequences: Sequences, tokens: FitTokens, folder: Path
    ) -> None:
        """Hold the hidden states in files of ``folder``."""
        self._decoder = decoder
        self._sequences = sequences
        self._tokens = tokens
        hidden = decoder.checkpoint.shape.hidden

        def states(name: str) -> States:
            return States(folder / f"apply-{name}.f32", hidden)

        self._original = (states("original-0"), states("original-1"))
        self._pruned = (states("pruned-0"), states("pruned-1"))
        self._inputs, self._target = states("inputs"), states("target")
        self.residual = states("residual")
        self._constants: ConstantSums | None = None

    def begin(self) -> None:
        """Both streams start at the embedding."""
        embed(self._decoder, self._sequences, self._original[0])
        embed(self._decoder, self._sequences, self._pruned[0])

    def last(self) -> tuple[States, States]:
        """What both streams hold after the last layer: the original's and the pruned model's."""
        parity = self._decoder.layers % 2
        return self._original[parity], self._pruned[parity]

    def end(self) -> None:
        """Remove the hidden states."""
        for states in (
            *(*self._original, *self._pruned),
            *(self._inputs, self._target, self.residual),
        ):
            states.remove()

    def pass_through(self, layer: Layer) -> None:
        """Run an unchanged layer on both streams."""
        for batch in self._tokens.batches:
            for streams in (self._original, self._pruned):
                r_BLD, z_BLD = self._attend(layer, batch, streams)
                after = streams[(layer.index + 1) % 2]
                batch.store(after, r_BLD + layer.feed_forward(z_BLD))

    def fit(
        self,
        layer: Layer,
        mixture: Mixture,
        planned: LayerPlan,
        refit_by: Refit | None,
        router_by: RouterFit | None = None,
        heal_by: Heal | None = None,
    ) -> FittedLayer:
        """Build a changed layer, re-fit what is asked for; both streams move on."""
        self.meet(layer, mixture, planned.replaced())
        fitted = self.attempt(layer, mixture, planned, refit_by, router_by, heal_by)
        self.advance(layer)
        return fitted

    def meet(self, layer: Layer, mixture: Mixture, replaced: tuple[int, ...] = ()) -> None:
        """Bring both streams to a changed layer's mixture; the original's moves past it.

        From here on plans for the layer can be attempted one after the other, those with constants
        only for the experts named here.
        """
        constants = self._constants = ConstantSums(mixture, replaced)
        for batch in self._tokens.batches:
            r_BLD, z_BLD = self._attend(layer, batch, self._original)
            goal_BLD = r_BLD + layer.feed_forward(z_BLD)
            batch.store(self._original[(layer.index + 1) % 2], goal_BLD)
            constants.observe(z_BLD.flatten(0, 1), self._tokens.omega_T[batch.tokens])
            r_BLD, z_BLD = self._attend(layer, batch, self._pruned)
            batch.store(self._inputs, z_BLD)
            batch.store(self._target, goal_BLD - r_BLD)

    def attempt(
        self,
        layer: Layer,
        mixture: Mixture,
        planned: LayerPlan,
        refit_by: Refit | None,
        router_by: RouterFit | None = None,
        heal_by: Heal | None = None,
    ) -> FittedLayer:
        """Build the layer that :meth:`meet` brought the streams to, and re-fit what is asked for.

        :attr:`residual` then holds what the layer's output lacks, token by token.
        """
        checkpoint = self._decoder.checkpoint
        schemes = checkpoint.expert_scheme(layer.index)
        table = planned.table()
        blocks = build_blocks(checkpoint, layer.index, planned, mixture.units)
        rows, source = None, mixture
        if planned.split is not None:
            dtype = checkpoint.read(checkpoint.family.gate_name(layer.index)).dtype
            source, blocks, table = split_layer(mixture, planned, blocks, schemes[2], dtype)
            rows = source.router.weight_ND.to(dtype)
        pruned = pruned_mixture(source, table, blocks, schemes)
        self._lack(pruned)
        if planned.constants and self._constants is not None:
            blocks = blocks._replace(constants_RD=self._constants.result(schemes[2]))
            pruned = self._add_constants(pruned, self._constants.replaced, blocks.constants_RD)
        record: dict[str, Any] = {}
        shared_matrix = None
        if planned.split is not None and planned.split.merges:
            dtype = checkpoint.read(checkpoint.family.gate_name(layer.index)).dtype
            joined = join_rows(
                mixture.router, pruned, planned, self._inputs, self.residual, self._tokens, dtype
            )
            record["merged_rows"] = {
                "chosen": joined.chosen,
                "held_out_error": joined.errors,
            }
            pruned = dataclasses.replace(pruned, router=joined.router)
            rows = joined.router.weight_ND.to(dtype)
        if heal_by is not None:
            found_rows, blocks, pruned = self._heal(
                layer, pruned, table, blocks, heal_by, refit_by, record
            )
            rows = rows if found_rows is None else found_rows
        if refit_by is not None:
            shared = shared_down(checkpoint, layer.index, refit_by)
            fitted = refit(
                with_shared(pruned) if shared else pruned,
                self._inputs,
                self.residual,
                self._tokens,
                refit_by,
                schemes[2],
                planned.width,
            )
            record |= {
                "ridge": fitted.ridge,
                "error_before": fitted.error_before,
                "error_after": fitted.error_after,
            }
            if shared:
                ends = self._inputs, self.residual, self._tokens
                pruned, fitted, shared_matrix = split_shared(
                    pruned, fitted, checkpoint.scheme(shared), *ends
                )
            pruned = dataclasses.replace(pruned, units=fitted.units)
            blocks = with_downs(blocks, table, fitted.stored, schemes[2])
        if router_by is not None:
            gate = checkpoint.read(checkpoint.family.gate_name(layer.index))
            found = fit_rows(
                pruned, self._inputs, self.residual, self._tokens, router_by, gate.dtype
            )
            record["router"] = {
                "ridge": found.ridge,
                "held_out_error_before": found.error_before,
                "held_out_error_after": found.error_after,
            }
            if found.ridge is not None:
                rows = found.router.weight_ND.to(gate.dtype)
        return FittedLayer(blocks=blocks, rows_ND=rows, shared=shared_matrix, record=record)

    def _heal(
        self,
        layer: Layer,
        pruned: Mixture,
        table: LayerTable,
        blocks: LayerBlocks,
        by: Heal,
        refit_by: Refit | None,
        record: dict[str, Any],
    ) -> tuple[torch.Tensor | None, LayerBlocks, Mixture]:
        """Train the layer; new router rows (``None`` where nothing was gained), blocks, layer.

        It starts from a re-fit of its own, which leaves the held-out tokens out: the error on them
        is then no better before than after.
        """
        checkpoint = self._decoder.checkpoint
        schemes = checkpoint.expert_scheme(layer.index)
        start = pruned
        if refit_by is not None:
            ends = self._inputs, self.residual, apart(self._tokens)
            fitted = refit(pruned, *ends, refit_by, schemes[2], table.width)
            start = dataclasses.replace(pruned, units=fitted.units)
        healed = heal(start, self._inputs, self._target, self._tokens, by)
        record["heal"] = {"held_out_errors": list(healed.errors)}
        rows = None
        if min(healed.errors) < healed.errors[0]:
            dtype = checkpoint.read(checkpoint.family.gate_name(layer.index)).dtype
            rows = healed.mixture.router.weight_ND.to(dtype)
            router = dataclasses.replace(pruned.router, weight_ND=rows.float())
            blocks = with_units(blocks, table, healed.mixture.units, schemes)
            whole = dataclasses.replace(pruned, router=router)
            pruned = pruned_mixture(whole, table, blocks, schemes)
        self._lack(pruned)
        return rows, blocks, pruned

    def _lack(self, pruned: Mixture) -> None:
        """The residual: what a layer's output lacks."""
        for batch in self._tokens.batches:
            lacking_TD = batch.load_flat(self._target) - pruned(batch.load_flat(self._inputs))
            self.residual.write(batch.tokens.start, lacking_TD)

    def advance(self, layer: Layer) -> None:
        """The pruned stream moves past the layer as it was attempted last."""
        self._constants = None  # It holds experts of the layer.
        after = (layer.index + 1) % 2
        for batch in self._tokens.batches:
            # goal - residual is r + P W on the rounded weights: what will be served.
            batch.store(
                self._pruned[after], batch.load(self._original[after]) - batch.load(self.residual)
            )

    def _add_constants(
        self, pruned: Mixture, replaced: tuple[int, ...], constants_RD: torch.Tensor | None
    ) -> Mixture:
        """The pruned layer with its constants; what they add is taken out of the residual."""
        if constants_RD is None or not replaced:
            return pruned
        whole, alone = with_constants(pruned, replaced, constants_RD)
        for batch in self._tokens.batches:
            added_TD = alone(batch.load_flat(self._inputs))
            batch.store(self.residual, batch.load_flat(self.residual) - added_TD)
        return whole

    def _attend(
        self, layer: Layer, batch: Batch, streams: tuple[States, States]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_BLD = batch.load(streams[layer.index % 2])
        r_BLD = layer.attend(x_BLD, self._decoder.rotary(*batch.shape))
        return r_BLD, layer.normed(r_BLD)


def held_out(sequences: Sequences, share: float) -> torch.Tensor:
    """Every n-th sequence of each domain, as a mask over tokens."""
    every = max(2, round(1 / share))
    seen: dict[int, int] = {}
    parts = []
    for tokens, domain in zip(sequences.tokens, sequences.domain, strict=True):
        number = seen.get(domain, 0)
        seen[domain] = number + 1
        parts.append(torch.full((len(tokens),), number % every == every - 1))
    return torch.cat(parts)
