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
from typing import Final

from moe_serve.checkpoint.form import Form
from moe_serve.checkpoint.layout import (
    Stored,
    compact_config,
    stock_config,
    substitution_config,
)
from moe_serve.checkpoint.quantisation import (
    Renumbering,
    quantisation_settings,
    renumbered_settings,
)
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.table import CompactTable
from moe_serve.errors import PlanError, UsageError


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
    # The others' softmax must not count a dropped expert's logit, whatever the bias says.
    told = bool(silenced) and checkpoint.family.routing.score == "sigmoid"
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
        mask={} if same or told else {i: d for i, d in dropped.items() if d},
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
                where="--format",
            )
        kept[i] = tuple(e for e, blocks in enumerate(layer.experts) if blocks is not None)
        sizes |= {(len(kept[i]), len(layer.experts[e] or ()) * layer.width) for e in kept[i]}
    if len(sizes) != 1:
        raise PlanError(
            "stock software wants one expert count and one width for all layers, "
            f"this plan has {len(sizes)} combinations",
            remedy="use --format compact, or prune with --format native from the start",
            where="--format",
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
            where="--format",
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
