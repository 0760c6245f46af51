"""Two streams of hidden states through the layers, so that each layer fits what is left to fit.

Shape suffixes: B sequences, L tokens each, D hidden size, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_serve.calibration.decoder import Decoder, Layer
from moe_serve.calibration.mixture import Mixture
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch, embed
from moe_serve.calibration.trace import Trace
from moe_serve.checkpoint.form import LayerBlocks
from moe_serve.checkpoint.quantisation import Matrix, Scheme
from moe_serve.errors import located
from moe_serve.pruning.fitting.build import build_blocks, pruned_mixture, with_downs, with_units
from moe_serve.pruning.fitting.constants import ConstantSums, with_constants
from moe_serve.pruning.fitting.goals import Goal, PredictionGoal, StreamGoal
from moe_serve.pruning.fitting.heal import apart, heal, held_error
from moe_serve.pruning.fitting.joining import join_rows
from moe_serve.pruning.fitting.refit import FitTokens, mean_square, refit, side_of
from moe_serve.pruning.fitting.routed import Routed
from moe_serve.pruning.fitting.router import fit_rows
from moe_serve.pruning.fitting.shared import shared_down, split_shared, with_shared
from moe_serve.pruning.fitting.split import split_layer
from moe_serve.pruning.plan import Heal, LayerPlan, Refit, RouterFit


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
        self,
        decoder: Decoder,
        sequences: Sequences,
        tokens: FitTokens,
        folder: Path,
        trace: Trace,
        *,
        first: int,
    ) -> None:
        """Nothing is computed yet.

        Args:
            decoder: the original's.
            sequences: the tokens.
            tokens: the same as batches, with their part in the fits.
            folder: holds the pruned model's hidden states in files.
            trace: the original's hidden states, or where they go.
            first: the first layer that will be changed: up to it there is one stream.
        """
        self._decoder = decoder
        self._sequences = sequences
        self._tokens = tokens
        hidden = decoder.checkpoint.shape.hidden

        def states(name: str) -> States:
            return States(folder / f"apply-{name}.f32", hidden)

        self._trace, self._first = trace, first
        self._pruned = (states("pruned-0"), states("pruned-1"))
        self._inputs, self._target = states("inputs"), states("target")
        self.residual, self._kept = states("residual"), states("kept")
        self._constants: ConstantSums | None = None

    def begin(self) -> None:
        """The streams start at the embedding."""
        if not self._trace.known:
            embed(self._decoder, self._sequences, self._trace.states[0])

    def last(self) -> tuple[States, States]:
        """What both streams hold after the last layer: the original's and the pruned model's."""
        layers = self._decoder.layers
        return self._trace.states[layers], self._entrance(layers)

    def end(self) -> None:
        """Remove the hidden states."""
        ours = (self._inputs, self._target, self.residual, self._kept)
        for states in (*self._pruned, *ours):
            states.remove()
        self._trace.remove()

    def _entrance(self, index: int) -> States:
        """The pruned stream where it enters a layer."""
        return self._trace.states[index] if index <= self._first else self._pruned[index % 2]

    def pass_through(self, layer: Layer) -> None:
        """Run an unchanged layer on both streams."""
        index, original = layer.index, self._trace.states
        ends = [] if self._trace.known else [(original[index], original[index + 1])]
        if index >= self._first:
            ends.append((self._entrance(index), self._entrance(index + 1)))
        for batch in self._tokens.batches:
            for before, after in ends:
                r_BLD, z_BLD = self._attend(layer, batch, before)
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
        before, after = self._trace.states[layer.index : layer.index + 2]
        own = self._entrance(layer.index)
        for batch in self._tokens.batches:
            ends = None
            if replaced or not self._trace.known:
                ends = r_BLD, z_BLD = self._attend(layer, batch, before)
                constants.observe(z_BLD.flatten(0, 1), self._tokens.omega_T[batch.tokens])
                if not self._trace.known:
                    batch.store(after, r_BLD + layer.feed_forward(z_BLD))
            if ends is None or own is not before:
                ends = self._attend(layer, batch, own)
            r_BLD, z_BLD = ends
            batch.store(self._inputs, z_BLD)
            batch.store(self._target, batch.load(after) - r_BLD)

    def attempt(
        self,
        layer: Layer,
        mixture: Mixture,
        planned: LayerPlan,
        refit_by: Refit | None,
        router_by: RouterFit | None = None,
        heal_by: Heal | None = None,
        hopeful: Callable[[Mixture], bool] = lambda _: True,
    ) -> FittedLayer:
        """Build the layer that :meth:`meet` brought the streams to, and re-fit what is asked for.

        :attr:`residual` then holds what the layer's output lacks, token by token.

        Args:
            layer: the original's.
            mixture: its mixture.
            planned: what becomes of it.
            refit_by: how what is kept is re-fitted.
            router_by: how the router is.
            heal_by: how the layer is trained.
            hopeful: asked about the layer as it was built, constants apart; where it says no, the
                attempt ends there, and :attr:`residual` is void.
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
        shared = shared_down(checkpoint, layer.index, refit_by)
        side = side_of(refit_by, planned.width) if refit_by is not None else None

        def routed_of(mixture: Mixture) -> Routed:
            whole = with_shared(mixture) if shared else mixture
            return Routed(whole, self._inputs, self._tokens.batches, side=side)

        record: dict[str, Any] = {}
        if not hopeful(pruned):
            return FittedLayer(blocks=blocks, rows_ND=rows, record=record)
        start, routed = pruned, routed_of(pruned)
        self._lack(routed)
        if planned.constants and self._constants is not None:
            blocks = blocks._replace(constants_RD=self._constants.result(schemes[2]))
            pruned = self._add_constants(pruned, self._constants.replaced, blocks.constants_RD)
        shared_matrix = None
        if planned.split is not None and planned.split.merges:
            pruned, rows = self._join(layer, mixture, pruned, planned, record)
        if heal_by is not None:
            goal = self._goal(layer)
            record["error_before"] = mean_square(self.residual, self._tokens)
            gained, found_rows, blocks, pruned = self._heal(
                layer, pruned, planned, blocks, goal, heal_by, refit_by, record
            )
            rows = rows if found_rows is None else found_rows
            if (
                gained
                and self._ends_with(layer)
                and not (shared and self._closes(goal, routed_of(pruned), refit_by, schemes[2]))
            ):
                record["error_after"] = mean_square(self.residual, self._tokens)
                refit_by = router_by = None
        if refit_by is not None:
            if pruned is not start:
                routed = routed_of(pruned)
            with located(f"layer {layer.index}"):
                fitted = refit(routed, self.residual, self._tokens, refit_by, schemes[2])
            record.setdefault("error_before", fitted.error_before)
            record |= {"ridge": fitted.ridge, "error_after": fitted.error_after}
            if shared:
                ends = self._inputs, self.residual, self._tokens
                pruned, fitted, shared_matrix = split_shared(
                    pruned, fitted, checkpoint.scheme(shared), *ends
                )
            pruned = dataclasses.replace(pruned, units=fitted.units)
            blocks = with_downs(blocks, table, fitted.stored, schemes[2])
        if router_by is not None:
            found = self._fit_router(layer, pruned, router_by, record)
            rows = rows if found is None else found
        return FittedLayer(blocks=blocks, rows_ND=rows, shared=shared_matrix, record=record)

    def keep(self) -> None:
        """Remember what the last attempt leaves, for :meth:`recall`; :attr:`residual` is void."""
        self.residual, self._kept = self._kept, self.residual

    def recall(self) -> None:
        """Stand where the attempt kept last has led."""
        self.residual, self._kept = self._kept, self.residual

    def _heal(
        self,
        layer: Layer,
        pruned: Mixture,
        planned: LayerPlan,
        blocks: LayerBlocks,
        goal: Goal,
        by: Heal,
        refit_by: Refit | None,
        record: dict[str, Any],
    ) -> tuple[bool, torch.Tensor | None, LayerBlocks, Mixture]:
        """Train the layer; whether it gained, new router rows where they moved, blocks, layer.

        It starts from a re-fit of its own, which leaves the held-out tokens out: the error on them
        is then no better before than after.
        """
        checkpoint = self._decoder.checkpoint
        schemes = checkpoint.expert_scheme(layer.index)
        start, table = pruned, planned.table()
        if refit_by is not None:
            routed = Routed(
                pruned, self._inputs, self._tokens.batches, side=side_of(refit_by, table.width)
            )
            fitted = refit(routed, self.residual, apart(self._tokens), refit_by, schemes[2])
            start = dataclasses.replace(pruned, units=fitted.units)
        healed = heal(start, self._inputs, goal, self._tokens, by, reroutes=planned.reroutes)
        record["heal"] = {"held_out_errors": list(healed.errors)}
        rows, gained = None, min(healed.errors) < healed.errors[0]
        if gained:
            weight_ND = healed.mixture.router.weight_ND
            if not torch.equal(weight_ND, pruned.router.weight_ND):
                dtype = checkpoint.read(checkpoint.family.gate_name(layer.index)).dtype
                rows = weight_ND.to(dtype)
                router = dataclasses.replace(pruned.router, weight_ND=rows.float())
                pruned = dataclasses.replace(pruned, router=router)
            blocks = with_units(blocks, table, healed.mixture.units, schemes)
            pruned = pruned_mixture(pruned, table, blocks, schemes)
        self._lack(Routed(pruned, self._inputs, self._tokens.batches))
        return gained, rows, blocks, pruned

    def _join(
        self,
        layer: Layer,
        mixture: Mixture,
        pruned: Mixture,
        planned: LayerPlan,
        record: dict[str, Any],
    ) -> tuple[Mixture, torch.Tensor]:
        """The layer with the rows of merged experts joined, and all rows as stored."""
        checkpoint = self._decoder.checkpoint
        dtype = checkpoint.read(checkpoint.family.gate_name(layer.index)).dtype
        joined = join_rows(
            mixture.router, pruned, planned, self._inputs, self.residual, self._tokens, dtype
        )
        record["merged_rows"] = {"chosen": joined.chosen, "held_out_error": joined.errors}
        rows_ND = joined.router.weight_ND.to(dtype)
        return dataclasses.replace(pruned, router=joined.router), rows_ND

    def _closes(self, goal: Goal, routed: Routed, by: Refit | None, scheme: Scheme) -> bool:
        """Whether the closed form leads nearer to the goal than training did.

        On held-out tokens, which neither of the two was fitted to. Asked where it reaches a shared
        expert too, which training leaves as it is: these tokens may come from the same documents,
        which favours the closed form, and without that gain other documents did not agree.
        """
        if by is None:
            return False
        ends = self._target, self.residual, self._tokens
        trained = held_error(goal, *ends)
        refit(routed, self.residual, apart(self._tokens), by, scheme)
        closed = held_error(goal, *ends)
        self._lack(routed)
        return closed < trained

    def _fit_router(
        self, layer: Layer, pruned: Mixture, by: RouterFit, record: dict[str, Any]
    ) -> torch.Tensor | None:
        """New router rows; ``None`` where nothing was gained."""
        checkpoint = self._decoder.checkpoint
        dtype = checkpoint.read(checkpoint.family.gate_name(layer.index)).dtype
        found = fit_rows(pruned, self._inputs, self.residual, self._tokens, by, dtype)
        record["router"] = {
            "ridge": found.ridge,
            "held_out_error_before": found.error_before,
            "held_out_error_after": found.error_after,
        }
        return None if found.ridge is None else found.router.weight_ND.to(dtype)

    def _ends_with(self, layer: Layer) -> bool:
        """Whether it is the last one."""
        return layer.index == self._decoder.layers - 1

    @torch.inference_mode(mode=False)  # Its tensors take part in a graph.
    def _goal(self, layer: Layer) -> Goal:
        """What the layer is trained towards."""
        if not self._ends_with(layer):
            return StreamGoal(target=self._target)
        final = self._trace.states[layer.index + 1]
        return PredictionGoal(head=self._decoder.head(), final=final, target=self._target)

    def lack(self, pruned: Mixture, batch: Batch, some_T: torch.Tensor) -> torch.Tensor:
        """What a layer's output lacks [t, D] on some tokens of a batch."""
        z_tD, target_tD = (batch.load_flat(s)[some_T] for s in (self._inputs, self._target))
        return target_tD - pruned(z_tD)

    def _lack(self, pruned: Routed) -> None:
        """The residual: what a layer's output lacks."""
        for number, batch in enumerate(self._tokens.batches):
            lacking_TD = batch.load_flat(self._target) - pruned.output(number)
            batch.store(self.residual, lacking_TD)

    def advance(self, layer: Layer) -> None:
        """The pruned stream moves past the layer as it was attempted last."""
        self._constants = None  # It holds experts of the layer.
        goal, after = self._trace.states[layer.index + 1], self._entrance(layer.index + 1)
        for batch in self._tokens.batches:
            # goal - residual is r + P W on the rounded weights: what will be served.
            batch.store(after, batch.load(goal) - batch.load(self.residual))

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
        self, layer: Layer, batch: Batch, before: States
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r_BLD = layer.attend(batch.load(before), self._decoder.rotary(*batch.shape))
        return r_BLD, layer.normed(r_BLD)
