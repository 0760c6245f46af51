"""A compact checkpoint in another format."""

from __future__ import annotations

import shutil
from pathlib import Path

from moe_serve.checkpoint.card import write_card
from moe_serve.checkpoint.form import LayerBlocks
from moe_serve.checkpoint.formats import form_named
from moe_serve.checkpoint.layout import carry_over, write_config
from moe_serve.checkpoint.manifest import Manifest
from moe_serve.checkpoint.shards import ShardWriter
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.checkpoint.staging import require_space, staged
from moe_serve.errors import UsageError
from moe_serve.files import writing
from moe_serve.progress import SILENT, Progress


def export(source: Path, target: Path, form_name: str, progress: Progress = SILENT) -> Path:
    """Write ``source``, a compact checkpoint, as ``tied``, ``native`` or ``substitution``.

    Reads every byte once; resumable layer by layer. Peak memory: one layer's blocks.

    Raises:
        UsageError: the source is not compact.
        PlanError: the table can't be expressed in that format.
        OutputError: the target can't be written.
    """
    checkpoint = open_checkpoint(source)
    if not checkpoint.is_compact:
        raise UsageError(
            "is not a compact checkpoint",
            where=str(source),
            remedy="give what moe-serve prune wrote with --format compact: only it holds the table "
            "that the other formats need",
        )
    form = form_named(form_name, checkpoint, checkpoint.table)
    manifest = Manifest.load(source)
    fingerprint = {
        "source": checkpoint.fingerprint(),
        "shards": checkpoint.freshness(),
        "format": form_name,
    }
    with staged(target, fingerprint) as staging:
        layout = form.runs()
        require_space(staging.path, sum(spec.size for run in layout for spec in run))
        writer = ShardWriter(staging.path, layout)
        layers = sorted(checkpoint.table.layers)
        progress.start("export", len(layers) + 1)
        if staging.done("copy") is None:
            form.copy_unchanged(writer)
            writer.sync()
            staging.finish("copy")
        progress.advance()
        for layer in layers:
            if staging.done(f"layer/{layer}") is None:
                form.write_layer(writer, layer, read_blocks(checkpoint, layer))
                writer.sync()
                staging.finish(f"layer/{layer}")
            progress.advance()
        writer.write_index()
        write_config(staging.path, form.config)
        form.write_extras(staging.path)
        carry_over(checkpoint, staging.path)
        for name in ("plan.json", "evidence.json"):
            if (source / name).exists():
                with writing(staging.path / name):
                    shutil.copyfile(source / name, staging.path / name)
        exported = manifest.model_copy(update={"format": form_name})
        write_card(staging.path, exported, served=checkpoint.family.served)
        exported.save(staging.path, progress)
    return target


def read_blocks(checkpoint: Checkpoint, layer: int) -> LayerBlocks:
    """One layer's stored blocks in their own format."""
    count = checkpoint.table.layers[layer].blocks
    names = [checkpoint.block_names(layer, number) for number in range(count)]
    gate, up, down = ([checkpoint.stored(n[i]) for n in names] for i in range(3))
    return LayerBlocks(gate=gate, up=up, down=down)
