"""``inspect``: what a checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moe_serve.cli import options
from moe_serve.cli.output import out, print_json
from moe_serve.evaluation.inspection import inspect


def inspect_command(
    folder: Annotated[Path, typer.Argument(help="A checkpoint directory.")],
    as_json: options.Json = False,
) -> None:
    """Say what a checkpoint is, where its bytes are and what can serve it."""
    found = inspect(folder)
    if as_json:
        print_json(found)
        return
    out.print(
        f"{found['architecture']}: {found['layers']} layers, {found['moe_layers']} with "
        f"{found['experts_per_layer']} experts of {found['expert_width']} neurons, "
        f"{found['top_k']} selected; experts in {'; '.join(found['expert_number_formats'])}"
    )
    table = Table("part", "bytes", "share")
    total = found["bytes"]["total"]
    for part, size in found["bytes"].items():
        table.add_row(part, f"{size:,}", f"{size / total:.1%}")
    out.print(table)
    for layer, compact in found["compact"].items():
        out.print(
            f"layer {layer}: {compact['blocks']} blocks of {compact['width']}, "
            f"{compact['dropped']} experts never selected"
        )
    prediction = found["prediction_layers"]
    if prediction["layers"]:
        out.print(
            f"layers {', '.join(map(str, prediction['layers']))} predict further tokens "
            f"({prediction['bytes']:,} bytes): they draft for this model and go when it is pruned"
        )
    if prediction["left_out"]:
        out.print(
            f"layers {', '.join(map(str, prediction['left_out']))} predicted further tokens for "
            "the original; pruning left them out"
        )
    out.print(f"served by {found['served_by']}")
    out.print(f"weights need {total / 1024**3:.2f} GiB of memory, KV cache and activations more")
