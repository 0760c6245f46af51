"""What ``--dry-run`` prints."""

from __future__ import annotations

import typer
from rich.table import Table

from moe_serve.cli.output import out, print_json
from moe_serve.pruning.forecasts.dryrun import DryRun


def show_forecast(found: DryRun, *, as_json: bool) -> None:
    """Print a forecast; exit 1 where this machine can't carry it out."""
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)
    if found.problems:
        raise typer.Exit(1)


def _print(found: DryRun) -> None:
    forecast, rates = found.forecast, found.rates
    table = Table("step", "passes", "TFLOP", "read GB", "written GB", "memory GB", "minutes")
    for step in forecast.steps:
        table.add_row(
            step.name,
            str(step.passes),
            f"{step.flops / 1e12:,.1f}",
            f"{step.read / 1e9:,.1f}",
            f"{step.written / 1e9:,.1f}",
            f"{(step.memory + forecast.base_memory) / 1e9:,.1f}",
            f"{step.seconds(rates) / 60:,.1f}",
        )
    out.print(table)
    out.print(
        f"about {forecast.seconds(rates) / 60:,.1f} minutes at {rates.flops / 1e9:,.0f} GFLOP/s, "
        f"{rates.read / 1e9:,.2f} GB/s read, {rates.write / 1e9:,.2f} GB/s written, as measured now"
    )
    out.print(
        f"peak memory {forecast.memory / 1e9:,.1f} GB of {found.free_memory / 1e9:,.1f} free; disk "
        f"{forecast.disk / 1e9:,.1f} GB of {found.free_disk / 1e9:,.1f} free, "
        f"{forecast.output_bytes / 1e9:,.1f} GB of it stay"
    )
    for problem in found.problems:
        out.print(f"PROBLEM: {problem}", markup=False, style="bold red")
