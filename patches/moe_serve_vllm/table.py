"""The remapping table: original expert id to stored blocks.

``config.json`` holds ``compact_experts = {"version": 1, "layers": {"<index>": {"width": b,
"blocks": M, "experts": [[3], [0, 1], [], null, ...]}}}``. ``experts[e]`` lists the blocks that
make up original expert e; ``[]`` adds nothing when selected; ``null`` is never selected. A layer
that is absent is as in the original.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import torch

from moe_serve_vllm.errors import TableError
from moe_serve_vllm.families import Config, Groups, ServedFamily, family_of

VERSION: Final = 1
WIDTH_MULTIPLE: Final = 32
"""Neurons that vLLM's CPU kernels read at a time."""
MAX_BLOCKS: Final = 8
MOST_SORTED: Final = 991
"""Blocks of one layer that vLLM's Triton kernels can sort: their number and the id for none,
rounded up to 32s, has to be less than 1024 (``triton_moe.py``, ``is_supported_config``)."""
_WHERE: Final = "config.json, compact_experts"
_REMEDY: Final = "restore config.json from the pruner's output, or prune again"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTable:
    """One layer's remapping. N experts, M blocks, R most blocks of any expert."""

    width: int
    blocks: int
    experts: tuple[tuple[int, ...] | None, ...]

    @property
    def most_blocks(self) -> int:
        """R, at least 1."""
        return max(1, *(len(e or ()) for e in self.experts))

    @property
    def padded(self) -> bool:
        """Whether some expert that can be selected has fewer blocks than another."""
        return any(e is not None and len(e) < self.most_blocks for e in self.experts)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Experts the router must not select."""
        return tuple(i for i, e in enumerate(self.experts) if e is None)

    def slots(self, *, skipped: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Block ids [N, R] (int32) and whether each slot counts [N, R] (FP32, 0 or 1).

        Args:
            skipped: a slot beyond an expert's blocks holds the id M, for kernels that leave out
                what :meth:`placement` maps to -1. Otherwise it repeats the expert's first block
                with weight 0, which every kernel can compute; where there is no map, an id of -1
                silently corrupts the output.
        """
        ids = torch.zeros(len(self.experts), self.most_blocks, dtype=torch.int32)
        used = torch.zeros(len(self.experts), self.most_blocks)
        for expert, blocks in enumerate(self.experts):
            if blocks:
                ids[expert] = blocks[0]
                ids[expert, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
                used[expert, : len(blocks)] = 1.0
        if skipped:
            ids = ids.masked_fill(used == 0, self.blocks)
        return ids, used

    def placement(self) -> torch.Tensor:
        """Where ids are stored [M + 1] (int32): block m at m, the id M nowhere.

        It has the form of vLLM's map for expert parallelism, whose kernels leave out what is on
        another device.
        """
        places = torch.arange(self.blocks + 1, dtype=torch.int32)
        places[-1] = -1
        return places


def skips_padding(*, cuda: bool, backend: str) -> bool:
    """Whether the kernels leave out slots whose id is stored nowhere.

    vLLM's Triton kernels drop them before the first product. Those for CPUs know no such map.
    """
    return cuda and backend == "TRITON"


def tables_of(config: Config) -> tuple[ServedFamily, dict[int, LayerTable]]:
    """The family and the checked table of a ``config.json``.

    Raises:
        TableError: it is not one of a compact checkpoint, or damaged.
    """
    family = family_of(config)
    if family is None:
        raise TableError(
            "config.json", ["architectures names no compact architecture"], "prune the model"
        )
    experts, top_k, width = family.sizes(config)
    tables = parse(
        config.get("compact_experts"),
        experts=experts,
        top_k=top_k,
        width=width,
        moe_layers=family.moe_layers(config),
        groups=family.groups(config),
    )
    return family, tables


def parse(
    value: object,
    *,
    experts: int,
    top_k: int,
    width: int,
    moe_layers: tuple[int, ...],
    groups: Groups | None = None,
) -> dict[int, LayerTable]:
    """Read and check the table.

    Args:
        value: ``compact_experts`` as in the config.
        experts: N.
        top_k: experts selected per token.
        width: I, neurons of an original expert.
        moe_layers: layers that hold experts.
        groups: the router's groups, where it narrows them down first.

    Raises:
        TableError: naming every defect.
    """
    if not isinstance(value, dict) or value.get("version") != VERSION:
        raise TableError(_WHERE, [f"is not version {VERSION}"], "update moe-serve in this image")
    layers = value.get("layers")
    if not isinstance(layers, dict):
        raise TableError(_WHERE, ["has no layers"], _REMEDY)
    problems: list[str] = []
    tables: dict[int, LayerTable] = {}
    for key, entry in layers.items():
        found, table = _parse_layer(entry, experts, width)
        if table is not None:
            found += _selection_defects(table, top_k, groups)
        if not (isinstance(key, str) and key.isdecimal() and int(key) in moe_layers):
            found.append("no layer with experts has this index")
        elif table is not None:
            tables[int(key)] = table
        problems += [f"layer {key}: {problem}" for problem in found]
    if problems:
        raise TableError(_WHERE, problems, _REMEDY)
    return tables


def _parse_layer(entry: Any, experts: int, whole: int) -> tuple[list[str], LayerTable | None]:
    match entry:
        case {"width": int(width), "blocks": int(blocks), "experts": list(lists)} if all(
            item is None or (isinstance(item, list) and all(type(b) is int for b in item))
            for item in lists
        ):
            table = LayerTable(
                width=width,
                blocks=blocks,
                experts=tuple(None if item is None else tuple(item) for item in lists),
            )
            return _defects(table, experts, whole), table
    return ["malformed entry"], None


def _defects(table: LayerTable, experts: int, whole: int) -> list[str]:
    found = []
    if len(table.experts) != experts:
        found.append(f"lists {len(table.experts)} experts, the router has {experts}")
    if table.width < 1 or (table.width % WIDTH_MULTIPLE and table.width != whole):
        found.append(f"width {table.width} is not a multiple of {WIDTH_MULTIPLE}")
    if table.blocks < 1:
        found.append("stores no block")
    used: set[int] = set()
    for expert, blocks in enumerate(table.experts):
        if blocks is None:
            continue
        if len(set(blocks)) != len(blocks):
            found.append(f"expert {expert} lists a block twice")
        if wrong := [b for b in blocks if not 0 <= b < table.blocks]:
            found.append(f"expert {expert} lists block {wrong[0]} of {table.blocks}")
        if len(blocks) > MAX_BLOCKS:
            found.append(f"expert {expert} has {len(blocks)} blocks, at most {MAX_BLOCKS}")
        used.update(blocks)
    # Not as a set of all blocks: a damaged count may be beyond what fits into memory.
    listed = range(min(table.blocks, len(used) + 1))
    found += [f"block {b} is used by no expert" for b in listed if b not in used][:1]
    return found


def _selection_defects(table: LayerTable, top_k: int, groups: Groups | None) -> list[str]:
    """Whether the router finds ``top_k`` experts whatever it prefers.

    A group in which fewer experts are left than rank a group is selected last, so what it still
    holds does not count.
    """
    if len(table.experts) - len(table.dropped) < top_k:
        return [f"fewer than top_k={top_k} experts can be selected"]
    if groups is None or len(table.experts) % groups.count:
        return []
    size = len(table.experts) // groups.count
    dropped = Counter(expert // size for expert in table.dropped)
    left = (size - dropped[group] for group in range(groups.count))
    usable = sorted(count for count in left if count >= groups.best)[: groups.selected]
    if sum(usable) < top_k:
        return [f"some {groups.selected} groups hold fewer than top_k={top_k} experts"]
    return []
