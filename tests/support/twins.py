"""A compact checkpoint and its full-size twin, made by plain loops: the oracle's two sides.

Independent of the product's own writer, so that an error there can't hide here.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_NUMBERED = ("model.layers.{l}.block_sparse_moe.experts.{e}.", ("w1", "w3", "w2"))
_OTHERS = ("model.layers.{l}.mlp.experts.{e}.", ("gate_proj", "up_proj", "down_proj"))
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_BIASES = (
    "model.layers.{l}.mlp.gate.e_score_correction_bias",
    "model.layers.{l}.block_sparse_moe.e_score_correction_bias",
    "model.layers.{l}.mlp.expert_bias",
    "model.layers.{l}.mlp.moe_statics.e_score_correction_bias",
)
Table = dict[str, Any]


def random_table(
    seed: int, kind: str, *, experts: int, width: int, top_k: int, group_size: int = 1
) -> Table:
    """One layer's table of a kind: whole, blocks, merged, empty, dropped or mixed.

    Experts are dropped by groups of ``group_size``: a router that ranks groups has no use for
    what is left of one.
    """
    rng = random.Random(f"{seed}/{kind}")
    block = width if kind in ("whole", "merged") else 32
    most = width // block
    lists: list[list[int] | None] = []
    count = 0
    for expert in range(experts):
        size = rng.randint(1, most)
        lists.append(list(range(count, count + size)))
        count += size
        if kind in ("merged", "mixed") and expert % 3 == 2:
            lists[-1] = list(lists[-2] or [])
            count -= size
        if kind in ("empty", "mixed") and expert % 4 == 1:
            count -= size
            lists[-1] = []
    if kind in ("dropped", "mixed", "whole"):
        limit = (experts - top_k) // group_size
        for first in rng.sample(range(experts // group_size), min(limit, 1 + seed % 3)):
            for expert in range(first * group_size, (first + 1) * group_size):
                lists[expert] = None
    return _renumbered(block, lists)


def _renumbered(width: int, lists: list[list[int] | None]) -> Table:
    """Number the blocks that are used without gaps."""
    used: dict[int, int] = {}
    for blocks in lists:
        for block in blocks or ():
            used.setdefault(block, len(used))
    renamed = [None if b is None else [used[x] for x in b] for b in lists]
    return {"width": width, "blocks": len(used), "experts": renamed}


def make_twins(
    source: Path, compact: Path, tied: Path, tables: dict[int, Table], seed: int = 0
) -> dict[int, list[int]]:
    """Write both sides; return the dropped experts that stock software has to be told of.

    Where the router has a correction bias and scores each expert by itself it is told by that.
    Every block takes its neurons from random experts, so a block in the wrong place shows.
    """
    config = json.loads((source / "config.json").read_text())
    numbered = config["model_type"] in ("mixtral", "minimax_m2")
    prefix, (gate, up, down) = _NUMBERED if numbered else _OTHERS
    weights = load_file(source / "model.safetensors")
    experts = next(config[key] for key in _COUNTS if key in config)
    width = weights[f"{prefix.format(l=max(tables), e=0)}{gate}.weight"].shape[0]
    small, full = dict(weights), dict(weights)
    generator = torch.Generator().manual_seed(seed)
    for layer, table in tables.items():
        names = [prefix.format(l=layer, e=e) for e in range(experts)]
        blocks = []
        for _ in range(table["blocks"]):
            expert = int(torch.randint(experts, (1,), generator=generator))
            rows = torch.randperm(width, generator=generator)[: table["width"]]
            blocks.append(
                (
                    weights[f"{names[expert]}{gate}.weight"][rows].clone(),
                    weights[f"{names[expert]}{up}.weight"][rows].clone(),
                    weights[f"{names[expert]}{down}.weight"][:, rows].clone(),
                )
            )
        for name in names:
            for projection in (gate, up, down):
                del small[f"{name}{projection}.weight"]
        for number, (g, u, d) in enumerate(blocks):
            name = prefix.format(l=layer, e=number)
            small[f"{name}{gate}.weight"] = g
            small[f"{name}{up}.weight"] = u
            small[f"{name}{down}.weight"] = d
        for expert, members in enumerate(table["experts"]):
            wide = torch.zeros(2, width, weights[f"{names[0]}{gate}.weight"].shape[1])
            tall = torch.zeros_like(weights[f"{names[0]}{down}.weight"])
            for place, member in enumerate(members or []):
                span = slice(place * table["width"], (place + 1) * table["width"])
                wide[0, span], wide[1, span] = blocks[member][0], blocks[member][1]
                tall[:, span] = blocks[member][2]
            full[f"{names[expert]}{gate}.weight"] = wide[0].clone()
            full[f"{names[expert]}{up}.weight"] = wide[1].clone()
            full[f"{names[expert]}{down}.weight"] = tall
    dropped = {
        layer: [e for e, blocks in enumerate(table["experts"]) if blocks is None]
        for layer, table in tables.items()
    }
    untold = _silence((small, full), dropped)
    for target in (compact, tied):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(small, compact / "model.safetensors", metadata={"format": "pt"})
    save_file(full, tied / "model.safetensors", metadata={"format": "pt"})
    table_config = {"version": 1, "layers": {str(i): t for i, t in tables.items()}}
    changed = config | {
        "architectures": ["Compact" + config["architectures"][0]],
        "compact_experts": table_config,
    }
    (compact / "config.json").write_text(json.dumps(changed))
    return untold


def _silence(
    sides: tuple[dict[str, torch.Tensor], ...], dropped: dict[int, list[int]]
) -> dict[int, list[int]]:
    """Say it by the correction biases; return what a mask has to say, too or alone."""
    untold = dict(dropped)
    for layer, ids in dropped.items():
        for name in (bias.format(l=layer) for bias in _BIASES):
            for weights in (side for side in sides if name in side):
                weights[name] = weights[name].index_fill(-1, torch.tensor(ids).long(), -1e30)
                if "moe_statics" not in name:  # ERNIE's softmax would count their logits.
                    untold.pop(layer, None)
    return untold
