"""``calibrate``, whole or in shards, and ``merge-statistics``, which adds shards up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table

from moe_serve.calibration.group import leads
from moe_serve.calibration.merge import merge_statistics
from moe_serve.calibration.share import WHOLE, Share
from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.cli import options
from moe_serve.cli.forecast import show_forecast
from moe_serve.cli.output import out, print_json
from moe_serve.cli.progress import progress_bar
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import DEFAULT_LENGTH, DEFAULT_TOKENS, TextOptions
from moe_serve.pruning.forecasts.dryrun import dry_run
from moe_serve.pruning.gathering import calibrate
from moe_serve.pruning.records.coverage import gaps
from moe_serve.pruning.records.evidence import Evidence
from moe_serve.pruning.request import DEFAULT_BATCH, PruneRequest, device_named
from moe_serve.pruning.selection import Selection

_SHOWN: Final = 20
"""Experts listed; the worst come first."""


def calibrate_command(
    model: options.Model,
    output: options.Output,
    calibration: options.Calibration = None,
    task_texts: options.TaskTexts = None,
    task_weight: options.TaskWeight = None,
    declaration: options.DeclarationFile = None,
    purpose: options.Purpose = None,
    tokens: options.Tokens = DEFAULT_TOKENS,
    length: options.Length = DEFAULT_LENGTH,
    batch_tokens: options.BatchTokens = DEFAULT_BATCH,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            help="Observe the second of four shares with 2/4; add them up with merge-statistics.",
        ),
    ] = None,
    from_traffic: Annotated[
        list[Path] | None,
        typer.Option(
            "--from-traffic",
            help="A saved /metrics page of an engine that counts selections: experts weigh as "
            "often as production selected them. Repeatable; counts add up.",
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    coverage: Annotated[
        bool,
        typer.Option(
            "--coverage",
            help="Say which experts too few tokens reached, and what would reach them.",
        ),
    ] = False,
    show: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Observe a model on texts; writes statistics.safetensors and statistics.json.

    Under torchrun its processes share the work.
    """
    texts = TextOptions(
        paths=tuple(calibration or ()),
        task_paths=tuple(task_texts or ()),
        task_weight=task_weight,
        tokens=tokens,
        length=length,
        seed=seed,
        declaration=declaration,
        purpose=purpose,
    )
    share = Share.parse(shard) if shard else WHOLE
    if show:
        request = PruneRequest(
            model=model,
            output=output,
            texts=texts,
            selection=Selection(),
            device=device_named(device),
            batch_tokens=batch_tokens,
        )
        show_forecast(dry_run(request, only_calibrate=True), as_json=as_json)
        return
    with progress_bar() as progress:
        shown = progress if leads() else Silent()
        made = calibrate(
            model,
            output,
            texts,
            device_named(device),
            batch_tokens,
            shown,
            share,
            traffic=tuple(from_traffic or ()),
        )
    if leads():
        found = Evidence.of(open_checkpoint(model), made) if coverage else None
        _report(made, found, as_json=as_json)


def merge_command(
    parts: Annotated[list[Path], typer.Argument(help="Folders that calibrate --shard made.")],
    output: options.Output,
    as_json: options.Json = False,
) -> None:
    """Add up the statistics of all shards: what one machine would have found."""
    with progress_bar() as progress:
        made = merge_statistics(parts, output, progress)
    _report(made, None, as_json=as_json)


def _report(made: Statistics, seen: Evidence | None, *, as_json: bool) -> None:
    if as_json:
        covered = {"coverage": [gap.to_json() for gap in gaps(seen)]} if seen else {}
        print_json({"output": str(made.folder), **made.record, **covered})
        return
    shard = f", shard {made.record['shard']}" if "shard" in made.record else ""
    out.print(f"{made.folder}: statistics of {sum(made.record['tokens'].values())} tokens{shard}")
    if seen is not None:
        _show_coverage(seen)


def _show_coverage(seen: Evidence) -> None:
    found = gaps(seen)
    out.print(
        f"{len(found)} of {seen.experts * len(seen.moe_layers)} experts were reached by fewer "
        f"tokens than they have neurons ({seen.width})"
    )
    if not found:
        return
    table = Table("layer", "expert", "tokens", "reached most by", "tokens of it that would do")
    for gap in found[:_SHOWN]:
        more = "" if gap.more is None else f"{gap.more:,} more"
        kind = escape(gap.domain) if gap.domain else "none of these domains"
        table.add_row(str(gap.layer), str(gap.expert), f"{gap.tokens:,}", kind, more)
    out.print(table)
    if len(found) > _SHOWN:
        out.print(f"and {len(found) - _SHOWN} more; --json prints all")
