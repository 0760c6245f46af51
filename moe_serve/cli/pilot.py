"""``pilot``: several prunings measured, and the page that a decision is made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from moe_serve.cli import options
from moe_serve.cli.output import err, out, print_json
from moe_serve.cli.progress import progress_bar
from moe_serve.errors import UsageError
from moe_serve.files import write_atomic
from moe_serve.pilot.decision import Option, misses, money, recommend
from moe_serve.pilot.page import page
from moe_serve.pilot.run import Pilot, run, to_json
from moe_serve.pilot.settings import TEMPLATE, load_settings
from moe_serve.pruning.corpus import DEFAULT_LENGTH, DEFAULT_TOKENS
from moe_serve.report.catalogue import LANGUAGES


def pilot_command(
    settings: Annotated[Path, typer.Argument(help="pilot.toml")] = Path("pilot.toml"),
    init: Annotated[
        bool, typer.Option("--init", help="Write a commented pilot.toml and stop.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Prune to several sizes, measure each, and say what it saves, loses and costs."""
    if init:
        _init(settings)
        return
    found = load_settings(settings)
    with progress_bar() as progress:
        pilot = run(found, progress)
    pages = {}
    for language in LANGUAGES:
        pages[language] = found.output / f"pilot.{language}.html"
        write_atomic(pages[language], page(pilot, language).encode())
    advice = recommend(pilot.options, found)
    if as_json:
        name = advice.option.name if advice.option else None
        files = {language: str(path) for language, path in pages.items()}
        print_json(to_json(pilot) | {"recommended": name, "pages": files})
        return
    out.print(_table(pilot))
    if advice.option is None:
        out.print(f"nothing is within tolerance; nearest: {advice.nearest.name}", markup=False)
    else:
        out.print(f"recommended: {advice.option.folder}", markup=False)
    for path in pages.values():
        out.print(str(path), markup=False)


def _init(path: Path) -> None:
    if path.exists():
        raise UsageError("exists already", where=str(path), remedy="give another name")
    text = TEMPLATE.format(
        model="model",
        calibration="calibration.jsonl",
        texts="heldout.jsonl",
        tokens=DEFAULT_TOKENS,
        length=DEFAULT_LENGTH,
    )
    write_atomic(path, text.encode())
    err.print(
        f"{path}: name your model and texts in it, then: moe-serve pilot {path}", markup=False
    )


def _table(pilot: Pilot) -> Table:
    currency = pilot.settings.prices.currency
    titles = ("option", "bytes", "cards", "KL (95 %)", "worst domain", "hours", currency, "within")
    # A narrow terminal breaks lines; it cuts no name and no interval short.
    table = Table(*(Column(title, overflow="fold") for title in titles))
    for option in pilot.options:
        cost = money(option, pilot.baseline, pilot.settings)
        missed = misses(option, pilot.settings.tolerance)
        table.add_row(
            option.name,
            f"{option.total_bytes / pilot.baseline.total_bytes:.0%}",
            str(option.gpus or "> 64"),
            f"{option.mean_kl:.4f}{_interval(option)}",
            f"{option.worst_kl:.4f} {option.worst_domain}",
            f"{cost.machine_hours:.2f} + {cost.person_hours:g}",
            f"{cost.once:,.0f}",
            "no: " + ", ".join(missed) if missed else "yes",
        )
    return table


def _interval(option: Option) -> str:
    if option.mean_kl_low is None or option.mean_kl_high is None:
        return ""
    return f" ({option.mean_kl_low:.4f}-{option.mean_kl_high:.4f})"
