"""The remapping table of a compact checkpoint: original expert id to stored blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from moe_serve.errors import CheckpointError
from moe_serve.families import Family, Routing

VERSION: Final = 1
WIDTH_MULTIPLE: Final = 32
"""vLLM's CPU kernels read neurons in groups of this many."""
MAX_BLOCKS: Final = 8
"""Blocks of one expert: each adds a row to the second matrix product."""
MOST_BLOCKS: Final = 991
"""Blocks of one layer that vLLM's Triton kernels can sort: their number and one for none, rounded
up to 32s, has to be less than 1024 (``triton_moe.py``, ``is_supported_config``)."""

Blocks = tuple[int, ...] | None
"""Blocks of one original expert; ``()`` adds nothing, ``None`` is never selected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTable:
    """One layer's remapping."""

    width: int
    """Neurons per block, b."""
    blocks: int
    """Stored blocks, M."""
    experts: tuple[Blocks, ...]
    """For each of the N original ids, its blocks."""

    @property
    def dropped(self) -> tuple[int, ...]:
        """Ids the router never selects."""
        return tuple(e for e, blocks in enumerate(self.experts) if blocks is None)

    def owners(self) -> tuple[tuple[int, ...], ...]:
        """For each block, the experts that use it."""
        owners: list[list[int]] = [[] for _ in range(self.blocks)]
        for expert, blocks in enumerate(self.experts):
            for block in blocks or ():
                owners[block].append(expert)
        return tuple(map(tuple, owners))

    def defects(self, *, experts: int, width: int, routing: Routing) -> list[str]:
        """Everything wrong with this layer's entry, in words; empty when it is sound.

        Args:
            experts: N, the router's rows.
            width: I, the original expert's neurons.
            routing: how the router selects.
        """
        found = []
        if len(self.experts) != experts:
            found.append(f"lists {len(self.experts)} experts, the router has {experts}")
        if self.width < 1 or (self.width % WIDTH_MULTIPLE and self.width != width):
            found.append(f"width {self.width} is not a multiple of {WIDTH_MULTIPLE}")
        used: set[int] = set()
        for expert, blocks in enumerate(self.experts):
            if blocks is None:
                continue
            if len(set(blocks)) != len(blocks):
                found.append(f"expert {expert} lists a block twice")
            if wrong := [b for b in blocks if not 0 <= b < self.blocks]:
                found.append(f"expert {expert} lists block {wrong[0]}, there are {self.blocks}")
            if len(blocks) > MAX_BLOCKS:
                found.append(f"expert {expert} has {len(blocks)} blocks, at most {MAX_BLOCKS}")
            if len(blocks) * self.width > width:
                found.append(
                    f"expert {expert} has {len(blocks) * self.width} neurons, more than {width}"
                )
            used.update(blocks)
        if unused := sorted(set(range(self.blocks)) - used):
            found.append(f"block {unused[0]} is used by no expert")
        if self.blocks < 1:
            found.append("stores no block")
        selectable = [e for e, blocks in enumerate(self.experts) if blocks is not None]
        return found + routing.selection_defects(selectable, experts)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompactTable:
    """All layers that were changed, by layer index; the others are as in the original."""

    layers: dict[int, LayerTable]

    def to_config(self) -> dict[str, Any]:
        """The value of ``compact_experts`` in ``config.json``."""
        return {
            "version": VERSION,
            "layers": {
                str(index): {
                    "width": layer.width,
                    "blocks": layer.blocks,
                    "experts": [None if b is None else list(b) for b in layer.experts],
                }
                for index, layer in sorted(self.layers.items())
            },
        }


def parse_table(config: Mapping[str, Any], family: Family, *, where: str) -> CompactTable:
    """Read and check ``compact_experts``; absent means nothing was changed.

    Raises:
        CheckpointError: naming every defect at once.
    """
    value = config.get("compact_experts")
    if value is None:
        return CompactTable(layers={})
    if not isinstance(value, dict) or value.get("version") != VERSION:
        raise CheckpointError(
            f"compact_experts is not version {VERSION}", where=where, remedy="prune the model again"
        )
    shape = family.shape(config)
    routing = family.routing_of(config)
    moe_layers = set(family.moe_layers(config))
    defects: list[str] = []
    layers: dict[int, LayerTable] = {}
    entries = value.get("layers")
    if not isinstance(entries, dict):
        entries, defects = {}, ["it has no layers"]
    for key, entry in entries.items():
        layer = _parse_layer(entry)
        if layer is None:
            defects.append(f"layer {key}: malformed entry")
        elif not key.isdecimal() or int(key) not in moe_layers:
            defects.append(f"layer {key}: no layer with experts has this index")
        else:
            layers[int(key)] = layer
            found = layer.defects(experts=shape.experts, width=shape.width, routing=routing)
            defects.extend(f"layer {key}: {defect}" for defect in found)
    if defects:
        raise CheckpointError(
            "compact_experts is damaged: " + "; ".join(defects),
            where=where,
            remedy="restore config.json from the pruner's output, or prune again",
        )
    return CompactTable(layers=layers)


def _parse_layer(entry: Any) -> LayerTable | None:
    match entry:
        case {"width": int(width), "blocks": int(blocks), "experts": list(experts)}:
            parsed: list[Blocks] = []
            for item in experts:
                if item is None:
                    parsed.append(None)
                elif isinstance(item, list) and all(type(b) is int for b in item):
                    parsed.append(tuple(item))
                else:
                    return None
            return LayerTable(width=width, blocks=blocks, experts=tuple(parsed))
    return None
