"""``calibrate``, whole or in shards, and ``merge-statistics``, which adds shards up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.markup import escape
from rich.table import Table

from moe_serve.calibration.group import leads, started
from moe_serve.calibration.merge import merge_statistics
from moe_serve.calibration.share import WHOLE, Share
from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.cli import options
from moe_serve.cli.forecast import show_forecast
from moe_serve.cli.output import out, print_json
from moe_serve.cli.progress import progress_bar
from moe_serve.errors import UsageError
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import DEFAULT_LENGTH, DEFAULT_TOKENS, TextOptions
from moe_serve.pruning.device import device_named
from moe_serve.pruning.forecasts.dryrun import dry_run
from moe_serve.pruning.gathering import calibrate
from moe_serve.pruning.records.coverage import gaps
from moe_serve.pruning.records.evidence import Evidence
from moe_serve.pruning.request import DEFAULT_BATCH, PruneRequest
from moe_serve.pruning.selection import Selection
from moe_serve.pruning.stability import TOLERANCE, Stable, calibrate_until_stable

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
    until_stable: Annotated[
        float | None,
        typer.Option(
            "--until-stable",
            help="Stop early: take twice as many tokens each time, up to --tokens, until a plan "
            "that keeps this share of the expert bytes no longer changes.",
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            help="With --until-stable: the plan from half the tokens may lose this share more of "
            "output error than the newer one, by the newer statistics."
        ),
    ] = TOLERANCE,
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
    if until_stable is not None and (shard or started()):
        raise UsageError(
            "looks at whole calibrations",
            where="--until-stable",
            remedy="leave out --shard, torchrun",
        )
    with progress_bar() as progress:

        def gathered(folder: Path, taken: TextOptions) -> Statistics:
            return calibrate(
                model,
                folder,
                taken,
                device_named(device),
                batch_tokens,
                progress if leads() else Silent(),
                share,
                traffic=tuple(from_traffic or ()),
            )

        stable = None
        if until_stable is not None:
            stable = calibrate_until_stable(
                model,
                output,
                texts,
                until_stable,
                tolerance,
                gathered,
                device=device_named(device),
            )
        made = stable.statistics if stable else gathered(output, texts)
    if leads():
        found = Evidence.of(open_checkpoint(model), made) if coverage else None
        _report(made, found, stable, as_json=as_json)


def merge_command(
    parts: Annotated[list[Path], typer.Argument(help="Folders that calibrate --shard made.")],
    output: options.Output,
    as_json: options.Json = False,
) -> None:
    """Add up the statistics of all shards: what one machine would have found."""
    with progress_bar() as progress:
        made = merge_statistics(parts, output, progress)
    _report(made, None, None, as_json=as_json)


def _report(
    made: Statistics, seen: Evidence | None, stable: Stable | None, *, as_json: bool
) -> None:
    if as_json:
        covered: dict[str, Any] = {}
        if seen is not None:
            covered["coverage"] = [gap.to_json() for gap in gaps(seen)]
        if stable is not None:
            covered["until_stable"] = stable.to_json()
        print_json({"output": str(made.folder), **made.record, **covered})
        return
    shard = f", shard {made.record['shard']}" if "shard" in made.record else ""
    out.print(f"{made.folder}: statistics of {sum(made.record['tokens'].values())} tokens{shard}")
    if stable is not None:
        _show_steps(stable)
    if seen is not None:
        _show_coverage(seen)


def _show_steps(stable: Stable) -> None:
    table = Table("tokens of a domain", "observed", "error of the plan before, more by")
    for step in stable.steps:
        changed = "" if step.regret is None else f"{step.regret:.1%}"
        table.add_row(f"{step.tokens:,}", f"{step.observed:,}", changed)
    out.print(table)
    last = stable.steps[-1].tokens
    if stable.settled:
        out.print(f"the plan no longer changes: stopped at {last:,} of {stable.allowed:,} tokens")
    else:
        out.print(f"the plan still changes by more than {stable.tolerance:.0%}: give more texts")


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
