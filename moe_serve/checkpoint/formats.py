"""Output formats: how a layer's blocks and its table become files.

``compact``
    blocks under their own numbers, the table in the config; served by the vLLM plugin.
``tied``
    full size: each original slot holds its blocks side by side, zero neurons up to I. The oracle.
``native``
    one expert count and one width for the whole model; any stock software loads it.
``substitution``
    whole experts under their original ids, a constant for each that went; vLLM's own from 0.33 on.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from moe_serve.checkpoint.dtypes import TORCH_DTYPES
from moe_serve.checkpoint.layout import (
    EMBEDDING,
    HEAD,
    Stored,
    compact_config,
    constant_dtype,
    copied_entries,
    needs_head,
    runs,
    stock_config,
    substitution_config,
)
from moe_serve.checkpoint.quantisation import (
    COLUMNS,
    ROWS,
    InexactJoin,
    Matrix,
    Renumbering,
    logical_name,
    quantisation_settings,
    renumbered_settings,
)
from moe_serve.checkpoint.shards import Run, ShardWriter, TensorSpec
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.substitution import constant_name
from moe_serve.checkpoint.table import CompactTable
from moe_serve.errors import PlanError, UsageError

ROUTER_MASK: Final = "router_mask.safetensors"
_SILENCE: Final = -1e30
"""A correction bias under which no expert is selected; finite in BF16 and FP32."""


class LayerBlocks(NamedTuple):
    """One layer's stored blocks in the checkpoint's number format."""

    gate: Sequence[Matrix]
    """[b, D] each."""
    up: Sequence[Matrix]
    """[b, D] each."""
    down: Sequence[Matrix]
    """[D, b] each."""
    constants_RD: torch.Tensor | None = None
    """Output of each expert that is replaced by a constant, ids ascending; ``None``: zero."""

    @property
    def matrices(self) -> tuple[Sequence[Matrix], Sequence[Matrix], Sequence[Matrix]]:
        """Gate, up and down projections."""
        return self.gate, self.up, self.down


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """An output in one format: config, files, and which slot holds which blocks."""

    name: str
    checkpoint: Checkpoint
    config: dict[str, Any]
    stored: dict[int, Stored]
    """For each changed layer, what its files hold."""
    slots: dict[int, tuple[tuple[int, ...], ...]]
    """For each changed layer and stored expert, the blocks it is made of."""
    rows: dict[int, tuple[int, ...]]
    """For layers whose router shrinks, the rows that stay."""
    mask: dict[int, tuple[int, ...]]
    """For layers with dropped experts that keep all router rows, the ids that are dropped: what
    stock software can't express."""
    silenced: dict[int, tuple[int, ...]]
    """The same where the router has a correction bias, which can express it."""

    def runs(self) -> list[Run]:
        """The tensors to write."""
        return runs(self.checkpoint, self.stored, head=self._head)

    @property
    def _head(self) -> bool:
        return "compact_experts" not in self.config and needs_head(self.checkpoint)

    def edited(self) -> dict[str, int]:
        """Tensors beside the experts that do not go over byte for byte, with their layers."""
        family = self.checkpoint.family
        names = {family.gate_name(layer): layer for layer in self.rows}
        for layer in (*self.rows, *self.silenced):
            if bias := family.bias_name(layer):
                names[bias] = layer
        for layer, stored in self.stored.items():
            if stored.shared is not None:
                for name in family.shared_names(layer) or ():
                    tensors = self.checkpoint.scheme(name).tensors(name)
                    names |= dict.fromkeys(tensors.values(), layer)
        return names

    def copy_unchanged(self, writer: ShardWriter) -> None:
        """Write every tensor that is not an expert of a changed layer."""
        edited = self.edited()
        for entry in copied_entries(self.checkpoint, set(self.stored)):
            if entry.name in edited:
                writer.write(entry.name, self._edit(entry.name, edited[entry.name]))
            else:
                content = self.checkpoint.read_bytes(entry.name)
                writer.write_bytes(entry.name, content)
                if self._head and entry.name == EMBEDDING:
                    writer.write_bytes(HEAD, content)

    def _edit(self, name: str, layer: int) -> torch.Tensor:
        """A shared expert with neurons of zero added, a router with rows gone or silenced."""
        shared = self.checkpoint.family.shared_names(layer)
        whole = logical_name(name)
        if shared is not None and whole in shared:
            axis = COLUMNS if whole == shared.down else ROWS
            scheme, stored = self.checkpoint.scheme(whole), self.checkpoint.stored(whole)
            length, hidden = self.stored[layer].shared or 0, self.checkpoint.shape.hidden
            grown = scheme.join([stored], axis, length, hidden)
            return next(grown[e] for e, tensor in scheme.tensors(whole).items() if tensor == name)
        weight = self.checkpoint.read(name)
        if layer in self.rows:
            return weight.index_select(0, torch.tensor(self.rows[layer]))
        weight = weight.clone()
        weight[list(self.silenced[layer])] = _SILENCE
        return weight

    def write_layer(self, writer: ShardWriter, layer: int, blocks: LayerBlocks) -> None:
        """Write one changed layer's experts. Memory beyond the blocks: one expert."""
        width, hidden = self.stored[layer].width, self.checkpoint.shape.hidden
        schemes = self.checkpoint.expert_scheme(layer)
        named = self.stored[layer].names(self.checkpoint.family, layer)
        for slot, (members, names) in enumerate(zip(self.slots[layer], named, strict=True)):
            for name, scheme, matrices, axis in zip(
                names, schemes, blocks.matrices, (ROWS, ROWS, COLUMNS), strict=True
            ):
                try:
                    whole = scheme.join([matrices[m] for m in members], axis, width, hidden)
                except InexactJoin as exc:
                    raise PlanError(
                        f"layer {layer}, expert {slot}: {exc}",
                        where=f"--format {self.name}",
                        remedy="use --format compact: only there has each block its own scale",
                    ) from None
                for ending, tensor in scheme.tensors(name).items():
                    writer.write(tensor, whole[ending])

        self._write_constants(writer, layer, blocks.constants_RD)

    def _write_constants(
        self, writer: ShardWriter, layer: int, constants_RD: torch.Tensor | None
    ) -> None:
        replaced, hidden = self.stored[layer].replaced, self.checkpoint.shape.hidden
        if not replaced:
            return
        if constants_RD is None:
            constants_RD = torch.zeros(len(replaced), hidden)
        dtype = TORCH_DTYPES[constant_dtype(self.checkpoint, layer)]
        for expert, value_D in zip(replaced, constants_RD, strict=True):
            name = constant_name(self.checkpoint.family, layer, expert)
            writer.write(name, value_D.to(dtype).cpu())

    def write_shared(self, writer: ShardWriter, layer: int, down: Matrix) -> None:
        """Write a new down projection [D, F] of the shared expert over the copied one."""
        names = self.checkpoint.family.shared_names(layer)
        if names is None:
            return
        scheme = self.checkpoint.scheme(names.down)
        if (length := self.stored[layer].shared) is not None:
            down = scheme.join([down], COLUMNS, length, self.checkpoint.shape.hidden)
        for ending, tensor in scheme.tensors(names.down).items():
            writer.write(tensor, down[ending].cpu())

    def write_router(self, writer: ShardWriter, layer: int, rows_ND: torch.Tensor) -> None:
        """Write new router rows: as many as are stored, or [N, D], of which those that stay."""
        if len(rows_ND) != self.stored[layer].rows:
            rows_ND = rows_ND[list(self.rows[layer])]
        writer.write(self.checkpoint.family.gate_name(layer), rows_ND.cpu().contiguous())

    def write_extras(self, target: Path) -> None:
        """Write ``router_mask.safetensors`` where stock software can't express the drops."""
        if not self.mask:
            return
        experts = self.checkpoint.shape.experts
        specs = [TensorSpec(name=str(i), dtype="F32", shape=(experts,)) for i in sorted(self.mask)]
        writer = ShardWriter(target, [(spec,) for spec in specs], file=ROUTER_MASK)
        for layer, dropped in self.mask.items():
            bias = torch.zeros(experts)
            bias[list(dropped)] = -torch.inf
            writer.write(str(layer), bias)


def compact_form(checkpoint: Checkpoint, table: CompactTable) -> Form:
    """Blocks under their own numbers."""
    experts = checkpoint.shape.experts
    return Form(
        name="compact",
        checkpoint=checkpoint,
        config=compact_config(checkpoint, table),
        stored={
            i: Stored(count=t.blocks, width=t.width, rows=experts) for i, t in table.layers.items()
        },
        slots={i: tuple((b,) for b in range(t.blocks)) for i, t in table.layers.items()},
        rows={},
        mask={},
        silenced=_silenced(checkpoint, {i: t.dropped for i, t in table.layers.items()}),
    )


def _silenced(
    checkpoint: Checkpoint, dropped: dict[int, tuple[int, ...]]
) -> dict[int, tuple[int, ...]]:
    if checkpoint.family.correction_bias is None:
        return {}
    return {layer: ids for layer, ids in dropped.items() if ids}


def tied_form(checkpoint: Checkpoint, table: CompactTable) -> Form:
    """Full size, in stock form; dropped rows go where every layer dropped the same number."""
    shape = checkpoint.shape
    layers = checkpoint.family.moe_layers(checkpoint.config)
    dropped = {i: table.layers[i].dropped if i in table.layers else () for i in layers}
    # Groups are runs of equal length: with rows gone they would be other groups.
    grouped = checkpoint.family.routing_of(checkpoint.config).groups > 1
    same = len({len(d) for d in dropped.values()}) == 1 and not grouped
    kept = {
        i: tuple(e for e in range(shape.experts) if not same or e not in dropped[i])
        for i in table.layers
    }
    shrunk = same and any(dropped.values())
    silenced = _silenced(checkpoint, dropped)
    count = len(kept[layers[0]]) if shrunk else shape.experts
    return Form(
        name="tied",
        checkpoint=checkpoint,
        config=stock_config(
            checkpoint, changed=bool(table.layers), experts=count if shrunk else None
        ),
        stored={i: Stored(count=count, width=shape.width, rows=count) for i in table.layers},
        slots={i: tuple(t.experts[e] or () for e in kept[i]) for i, t in table.layers.items()},
        rows=kept if shrunk else {},
        mask={} if same or silenced else {i: d for i, d in dropped.items() if d},
        silenced={} if same else silenced,
    )


def native_form(checkpoint: Checkpoint, table: CompactTable) -> Form:
    """One count, one width.

    Raises:
        PlanError: the layers differ, or experts share blocks.
    """
    shape = checkpoint.shape
    layers = checkpoint.family.moe_layers(checkpoint.config)
    sizes: set[tuple[int, int]] = set()
    kept: dict[int, tuple[int, ...]] = {}
    for i in layers:
        layer = table.layers.get(i)
        if layer is None:
            sizes.add((shape.experts, shape.width))
            continue
        if any(len(owners) > 1 for owners in layer.owners()):
            raise PlanError(
                f"layer {i}: experts share blocks, a stock router can't send two ids to one expert",
                remedy="use --format compact, or a method that drops",
            )
        kept[i] = tuple(e for e, blocks in enumerate(layer.experts) if blocks is not None)
        sizes |= {(len(kept[i]), len(layer.experts[e] or ()) * layer.width) for e in kept[i]}
    if len(sizes) != 1:
        raise PlanError(
            "stock software wants one expert count and one width for all layers, "
            f"this plan has {len(sizes)} combinations",
            remedy="use --format compact, or prune with --format native from the start",
        )
    count, width = sizes.pop()
    groups = checkpoint.family.routing_of(checkpoint.config).groups
    size = shape.experts // groups
    members = {
        tuple(Counter(e // size for e in k)[g] for g in range(groups)) for k in kept.values()
    }
    if any(len(set(counts)) > 1 for counts in members):
        raise PlanError(
            "the router selects among groups of experts, and dropping would shift their bounds",
            remedy="drop the same number from each group, use --format compact, or a method that "
            "keeps every expert",
        )
    shared = checkpoint.family.shared_count(checkpoint.config, width)
    grown = shared * width if shared is not None and width != shape.width else None
    return Form(
        name="native",
        checkpoint=checkpoint,
        config=stock_config(checkpoint, changed=bool(table.layers), experts=count, width=width),
        stored={
            i: Stored(count=count, width=width, rows=count, shared=grown) for i in table.layers
        },
        slots={i: tuple(table.layers[i].experts[e] or () for e in kept[i]) for i in kept},
        rows={i: k for i, k in kept.items() if len(k) < shape.experts},
        mask={},
        silenced={},
    )


def split_form(checkpoint: Checkpoint, table: CompactTable, top_k: int) -> Form:
    """One count and one width, each block an expert of its own.

    Raises:
        PlanError: the layers differ, a layer is unchanged, or the router ranks groups.
    """
    layers = checkpoint.family.moe_layers(checkpoint.config)
    sizes = {(t.blocks, t.width) for t in table.layers.values()}
    grouped = checkpoint.family.routing_of(checkpoint.config).groups > 1
    if len(sizes) != 1 or set(layers) != set(table.layers) or grouped:
        raise PlanError(
            "blocks as experts need the same number of one width in every layer, and a router "
            "without groups",
            where="--format native",
            remedy="prune with --format native from the start",
        )
    count, width = sizes.pop()
    shared = checkpoint.family.shared_count(checkpoint.config, width)
    grown = shared * width if shared is not None else None
    return Form(
        name="native",
        checkpoint=checkpoint,
        config=stock_config(checkpoint, changed=True, experts=count, width=width, top_k=top_k),
        stored={i: Stored(count=count, width=width, rows=count, shared=grown) for i in layers},
        slots={i: tuple((block,) for block in range(count)) for i in layers},
        rows={i: tuple(owned[0] for owned in table.layers[i].owners()) for i in layers},
        mask={},
        silenced={},
    )


def substitution_form(checkpoint: Checkpoint, table: CompactTable) -> Form:
    """Whole experts, and constants for those that have no block.

    Raises:
        PlanError: experts are narrowed, merged or never selected, or stored in quantised form.
    """
    shape = checkpoint.shape
    for i, layer in table.layers.items():
        held = [blocks for blocks in layer.experts if blocks]
        why = None
        if layer.dropped:
            why = "experts are never selected: this format leaves the router as it is"
        elif any(len(blocks) * layer.width != shape.width for blocks in held):
            why = "experts are narrower than the original's"
        elif any(len(owners) > 1 for owners in layer.owners()):
            why = "experts share blocks"
        elif not all(scheme.exact for scheme in checkpoint.expert_scheme(i)):
            why = "experts are quantised: vLLM takes constants beside plain numbers only"
        if why is not None:
            raise PlanError(
                f"layer {i}: {why}",
                where="--format substitution",
                remedy="prune with --format substitution and a method that drops whole experts, "
                "or use --format compact",
            )
    replaced = {
        i: tuple(e for e, blocks in enumerate(layer.experts) if not blocks)
        for i, layer in table.layers.items()
    }
    return Form(
        name="substitution",
        checkpoint=checkpoint,
        config=substitution_config(checkpoint, replaced),
        stored={
            i: Stored(
                count=shape.experts - len(ids), width=shape.width, rows=shape.experts, replaced=ids
            )
            for i, ids in replaced.items()
        },
        slots={
            i: tuple(blocks for blocks in layer.experts if blocks)
            for i, layer in table.layers.items()
        },
        rows={},
        mask={},
        silenced={},
    )


FORMATS: Final = {
    "compact": compact_form,
    "tied": tied_form,
    "native": native_form,
    "substitution": substitution_form,
}


def form_named(
    name: str, checkpoint: Checkpoint, table: CompactTable, top_k: int | None = None
) -> Form:
    """Find a format.

    Args:
        name: of the format.
        checkpoint: the original.
        table: what its layers become.
        top_k: blocks selected per token where each is an expert of its own.

    Raises:
        UsageError: no such format.
        PlanError: the plan can't be expressed in it.
    """
    if name not in FORMATS:
        raise UsageError(
            f"no format {name!r}", where="--format", remedy="choose from " + ", ".join(FORMATS)
        )
    if top_k is not None and name != "native":
        raise PlanError(
            "in this plan each block is an expert of its own",
            where=f"--format {name}",
            remedy="give --format native",
        )
    form = (
        FORMATS[name](checkpoint, table) if top_k is None else split_form(checkpoint, table, top_k)
    )
    settings = quantisation_settings(checkpoint.config)
    if not settings:
        return form
    family = checkpoint.family
    layers = [
        Renumbering(
            prefix=family.expert_prefix(layer),
            count=stored.count,
            plain=all(scheme.exact for scheme in checkpoint.expert_scheme(layer)),
        )
        for layer, stored in form.stored.items()
    ]
    gone = family.extra_prefixes(checkpoint.config) if form.stored else ()
    cleaned = renumbered_settings(settings, layers, gone)
    return dataclasses.replace(form, config=form.config | {"quantization_config": cleaned})
