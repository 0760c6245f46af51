"""``inspect``: what a checkpoint is, where its bytes are, and what can serve it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from moe_serve.checkpoint.manifest import MANIFEST, Manifest
from moe_serve.checkpoint.quantisation import quantisation_settings
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.checkpoint.table import MOST_BLOCKS


def inspect(path: Path) -> dict[str, Any]:
    """Describe a checkpoint from its config and headers; reads no weights.

    Raises:
        CheckpointError: it can't be opened.
    """
    checkpoint = open_checkpoint(path)
    shape, family = checkpoint.shape, checkpoint.family
    parts = _parts(checkpoint)
    total = sum(parts.values())
    experts = checkpoint.expert_bytes()
    table = checkpoint.table.layers
    return {
        "path": str(path),
        "family": family.model_type,
        "architecture": checkpoint.config.get("architectures", [family.architecture])[0],
        "layers": shape.layers,
        "moe_layers": len(experts),
        "experts_per_layer": shape.experts,
        "top_k": shape.top_k,
        "expert_width": shape.width,
        "hidden": shape.hidden,
        "number_formats": sorted({e.dtype for e in checkpoint.tensors.values()}),
        "expert_number_formats": sorted(
            {scheme.name for layer in experts for scheme in checkpoint.expert_scheme(layer)}
        ),
        "bytes": {"total": total, **dict(sorted(parts.items()))},
        "routed_expert_share": parts.get("routed_experts", 0) / total,
        "expert_bytes_per_layer": {str(i): size for i, size in experts.items()},
        "prediction_layers": _prediction(checkpoint),
        "compact": {
            str(i): {
                "width": t.width,
                "blocks": t.blocks,
                "dropped": len(t.dropped),
                "most_blocks_of_an_expert": max(len(e or ()) for e in t.experts),
            }
            for i, t in table.items()
            if i not in checkpoint.replaced
        },
        "replaced_by_constants": {str(i): list(e) for i, e in checkpoint.replaced.items()},
        "served_by": _served_by(checkpoint),
        "gpu_memory_for_weights_bytes": total,
    }


def _served_by(checkpoint: Checkpoint) -> str:
    if checkpoint.replaced:
        return (
            "vLLM 0.33 and later (approximate_experts); vLLM 0.32 and transformers would compute "
            "something else"
        )
    if not checkpoint.is_compact:
        return "transformers, vLLM and other software that knows the architecture"
    if quantisation_settings(checkpoint.config):
        return "nothing in this form, for it is quantised: export it with --format tied"
    if checkpoint.family.served:
        plugin = "vLLM 0.32 or 0.33 with the moe-serve plugin (--load-format moe_serve)"
        most = max((t.blocks for t in checkpoint.table.layers.values()), default=0)
        return plugin if most <= MOST_BLOCKS else f"{plugin}, on processors: GPUs sort no {most}"
    return "nothing in this form: export it with --format tied or native"


def _prediction(checkpoint: Checkpoint) -> dict[str, Any]:
    """Layers for multi-token prediction: those in the files, and those that pruning left out."""
    present = checkpoint.prediction_layers()
    made = Manifest.load(checkpoint.path) if (checkpoint.path / MANIFEST).exists() else None
    original = made.prediction_layers if made is not None else None
    return {
        "layers": list(present),
        "bytes": sum(present.values()),
        "left_out": list(original.layers) if original is not None and not original.kept else [],
    }


def _parts(checkpoint: Checkpoint) -> Counter[str]:
    """Bytes by what they are for."""
    family = checkpoint.family
    layers = family.moe_layers(checkpoint.config)
    experts = tuple(map(family.expert_prefix, layers))
    routers = set(map(family.gate_name, layers)) | set(map(family.bias_name, layers))
    predicting = family.extra_prefixes(checkpoint.config)
    parts: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        name = entry.name
        if predicting and name.startswith(predicting):
            parts["prediction_layers"] += entry.size
        elif name.startswith(experts):
            parts["routed_experts"] += entry.size
        elif name in routers:
            parts["routers"] += entry.size
        elif "shared_expert" in name:
            parts["shared_experts"] += entry.size
        elif ".self_attn." in name:
            parts["attention"] += entry.size
        elif "embed_tokens" in name or name.startswith("lm_head"):
            parts["embeddings"] += entry.size
        else:
            parts["other"] += entry.size
    return parts
