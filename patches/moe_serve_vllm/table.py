"""The remapping table: original expert id to stored blocks.

``config.json`` holds ``compact_experts = {"version": 1, "layers": {"<index>": {"width": b,
"blocks": M, "experts": [[3], [0, 1], [], null, ...]}}}``. ``experts[e]`` lists the blocks that
make up original expert e; ``[]`` adds nothing when selected; ``null`` is never selected. A layer
that is absent is as in the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

from moe_serve_vllm.errors import TableError

VERSION: Final = 1
WIDTH_MULTIPLE: Final = 32
"""Neurons that vLLM's CPU kernels read at a time."""
MAX_BLOCKS: Final = 8
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
    def dropped(self) -> tuple[int, ...]:
        """Experts the router must not select."""
        return tuple(i for i, e in enumerate(self.experts) if e is None)

    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Block ids [N, R] (int32) and whether each slot counts [N, R] (FP32, 0 or 1).

        A slot beyond an expert's blocks repeats its first block with weight 0: the kernels of
        every platform handle that, whereas an id of -1 silently corrupts the output on CPU.
        """
        ids = torch.zeros(len(self.experts), self.most_blocks, dtype=torch.int32)
        used = torch.zeros(len(self.experts), self.most_blocks)
        for expert, blocks in enumerate(self.experts):
            if blocks:
                ids[expert] = blocks[0]
                ids[expert, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
                used[expert, : len(blocks)] = 1.0
        return ids, used


def expand(
    ids_TK: torch.Tensor, weights_TK: torch.Tensor, slots_NR: torch.Tensor, used_NR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace each selected expert by its blocks, all with that expert's weight.

    Shapes depend on those of the inputs only, and nothing is read back to the host.

    Returns:
        Block ids and weights, both [T, K * R], in the inputs' types.
    """
    index = ids_TK.long()
    blocks_TKR = slots_NR[index].to(ids_TK.dtype)
    weights_TKR = weights_TK.unsqueeze(-1) * used_NR[index].to(weights_TK.dtype)
    return blocks_TKR.flatten(1), weights_TKR.flatten(1)


def parse(
    value: object, *, experts: int, top_k: int, width: int, moe_layers: tuple[int, ...]
) -> dict[int, LayerTable]:
    """Read and check the table.

    Args:
        value: ``compact_experts`` as in the config.
        experts: N.
        top_k: experts selected per token.
        width: I, neurons of an original expert.
        moe_layers: layers that hold experts.

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
        found, table = _parse_layer(entry, experts, top_k, width)
        if not (isinstance(key, str) and key.isdecimal() and int(key) in moe_layers):
            found.append("no layer with experts has this index")
        elif table is not None:
            tables[int(key)] = table
        problems += [f"layer {key}: {problem}" for problem in found]
    if problems:
        raise TableError(_WHERE, problems, _REMEDY)
    return tables


def _parse_layer(
    entry: Any, experts: int, top_k: int, whole: int
) -> tuple[list[str], LayerTable | None]:
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
            return _defects(table, experts, top_k, whole), table
    return ["malformed entry"], None


def _defects(table: LayerTable, experts: int, top_k: int, whole: int) -> list[str]:
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
    if unused := sorted(set(range(table.blocks)) - used):
        found.append(f"block {unused[0]} is used by no expert")
    if experts - len(table.dropped) < top_k:
        found.append(f"fewer than top_k={top_k} experts can be selected")
    return found
