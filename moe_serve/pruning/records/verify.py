"""Whether a written checkpoint is what its manifest says, and what its original implies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from moe_serve.calibration.mixture import read_mixture, whole_experts
from moe_serve.checkpoint.chain import broken
from moe_serve.checkpoint.finite import all_finite
from moe_serve.checkpoint.formats import form_named
from moe_serve.checkpoint.hashing import file_sha256
from moe_serve.checkpoint.layout import copied_entries
from moe_serve.checkpoint.manifest import MANIFEST, Manifest, hash_files
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.errors import UsageError
from moe_serve.files import read_json
from moe_serve.progress import SILENT, Progress
from moe_serve.pruning.fitting.build import build_blocks
from moe_serve.pruning.fitting.shared import shared_tensors
from moe_serve.pruning.plan import Plan

_WITH_ORIGINAL: Final = ("compact", "substitution")
"""Formats whose table can be read back and held against the plan."""


@dataclass(kw_only=True, slots=True)
class Verification:
    """What was checked and what was found wrong."""

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"passed": self.passed, "checked": self.checked, "problems": self.problems}


@torch.inference_mode()
def verify(folder: Path, original: Path | None = None, progress: Progress = SILENT) -> Verification:
    """Recompute hashes, structure, table and finiteness; with the original, the weights too.

    Args:
        folder: a checkpoint written by this program.
        original: what it was made from.
        progress: told about files and layers.

    Raises:
        CheckpointError: it can't even be opened.
    """
    found = Verification()
    checkpoint = open_checkpoint(folder)
    found.checked.append("headers, index, table and shapes agree")
    manifest = Manifest.load(folder)
    _files(folder, manifest, found, progress)
    _numbers(checkpoint, found, progress)
    if original is not None:
        _against(checkpoint, manifest, open_checkpoint(original), found, progress)
    return found


def _files(folder: Path, manifest: Manifest, found: Verification, progress: Progress) -> None:
    found.problems += broken(read_json(folder / MANIFEST), MANIFEST)
    present = hash_files(folder, progress, "hash")
    for name, digest in manifest.files.items():
        if name not in present:
            found.problems.append(f"{name} is missing")
        elif present[name] != digest:
            found.problems.append(f"{name} differs from its SHA-256 in {MANIFEST}")
    found.problems += [f"{n} is not in {MANIFEST}" for n in sorted(present.keys() - manifest.files)]
    found.checked.append(f"SHA-256 of {len(manifest.files)} files")
    plan = folder / "plan.json"
    if plan.exists() and Plan.load(plan).sha256() != manifest.plan_sha256:
        found.problems.append(f"plan.json is not the plan in {MANIFEST}")


def _numbers(checkpoint: Checkpoint, found: Verification, progress: Progress) -> None:
    progress.start("check numbers", len(checkpoint.tensors))
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        if tensor.is_floating_point() and not all_finite(tensor.float()):
            found.problems.append(f"tensor {name} holds NaN or infinite values")
        progress.advance()
    found.checked.append(f"{len(checkpoint.tensors)} tensors are finite")


def _against(
    checkpoint: Checkpoint,
    manifest: Manifest,
    original: Checkpoint,
    found: Verification,
    progress: Progress,
) -> None:
    if manifest.format not in _WITH_ORIGINAL:
        raise UsageError(
            f"is in format {manifest.format}",
            where=str(checkpoint.path),
            remedy="--original checks "
            + " and ".join(_WITH_ORIGINAL)
            + " checkpoints; verify the one this was exported from",
        )
    if file_sha256(original.path / "config.json") != manifest.original.config_sha256:
        found.problems.append("the original's config.json is not the one this was made from")
        return
    plan = Plan.load(checkpoint.path / "plan.json")
    plan.check(original)
    edited = set(form_named(manifest.format, original, plan.table()).edited())
    if plan.router is not None or plan.heal is not None:
        edited |= {original.family.gate_name(layer) for layer in plan.layers}
    fitted: set[str] = set()
    for layer in plan.layers:
        fitted |= shared_tensors(original, layer, plan.refit)
    found.problems += [
        f"tensor {name} has another type or shape than the original's"
        for name in sorted(fitted)
        if _form(checkpoint, name) != _form(original, name)
    ]
    edited |= fitted
    unchanged = [e for e in copied_entries(original, set(plan.layers)) if e.name not in edited]
    progress.start("compare with original", len(unchanged) + len(plan.layers))
    for entry in unchanged:
        if checkpoint.read_bytes(entry.name) != original.read_bytes(entry.name):
            found.problems.append(f"tensor {entry.name} differs from the original's")
        progress.advance()
    found.checked.append(f"{len(unchanged)} copied tensors are byte-identical to the original's")
    blocks = 0
    for index in plan.layers:
        found.problems += _layer_problems(checkpoint, original, plan, index)
        blocks += len(plan.layers[index].blocks)
        progress.advance()
    found.checked.append(f"{blocks} blocks hold the neurons that plan.json names")


def _layer_problems(
    checkpoint: Checkpoint, original: Checkpoint, plan: Plan, index: int
) -> list[str]:
    """Blocks whose weights are not those the plan names; re-fitted down projections may differ."""
    layer = plan.layers[index]
    untouched = whole_experts(original.shape.experts, original.shape.width)
    if checkpoint.table.layers.get(index, untouched) != layer.table():
        return [f"layer {index}: the table in config.json is not the plan's"]
    units = read_mixture(original, index, torch.device("cpu")).units
    expected = build_blocks(original, index, layer, units)
    problems = []
    for number in range(len(layer.blocks)):
        names = checkpoint.block_names(index, number)
        pairs = list(zip(names, (m[number] for m in expected.matrices), strict=True))
        trained = 0 if plan.heal else 2 if plan.refit else 3
        for name, weight in pairs[:trained]:
            stored = checkpoint.stored(name)
            problems += [
                f"{ending} of {name} is not what plan.json says"
                for ending, tensor in weight.items()
                if not _same_bytes(stored[ending], tensor)
            ]
    return problems


def _form(checkpoint: Checkpoint, name: str) -> tuple[str, tuple[int, ...]]:
    entry = checkpoint.tensors[name]
    return entry.dtype, entry.shape


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every bit; FP8 has no comparison of its own."""
    flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)
