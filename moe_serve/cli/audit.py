"""``audit``: the record of a checkpoint's texts, and what of it still holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from moe_serve.cli import options
from moe_serve.cli.output import out, print_json
from moe_serve.cli.progress import progress_bar
from moe_serve.pruning.records.audit import Audit, audit


def audit_command(
    folder: Annotated[
        Path, typer.Argument(help="A checkpoint or statistics written by moe-serve.")
    ],
    original: Annotated[
        Path | None, typer.Option(help="What it was made from; its hashes are checked too.")
    ] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(help="Its calibration texts; their hashes are checked too. Repeatable."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Print which texts were used, on whose terms; exit 1 where something is missing or changed."""
    with progress_bar() as progress:
        found = audit(folder, progress, original=original, texts=texts or ())
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)
    if not found.passed:
        raise typer.Exit(1)


def _print(found: Audit) -> None:
    record = found.record
    names = {"original": record["original"]["name"]} if "original" in record else {}
    names |= {"method": f"{record['method']}, seed {record['seed']}"} if "method" in record else {}
    for name in ("model", "fingerprint", "shard", "plan_sha256", "statistics_sha256"):
        if record.get(name):
            names[name] = record[name]
    names["tokens_sha256"] = record["tokens_sha256"] or "none"
    names["purpose"] = record["purpose"] or "not named"
    names["seal"] = found.seal or "none"
    for name, value in names.items():
        out.print(f"{name.replace('_', ' ')}: {value}", markup=False, soft_wrap=True)
    if found.sources:
        out.print(_sources(found.sources))
    for line in found.checked:
        out.print(f"checked: {line}", markup=False, soft_wrap=True)
    for line in found.problems:
        out.print(f"PROBLEM: {line}", markup=False, soft_wrap=True, style="bold red")


def _sources(sources: list[dict[str, Any]]) -> Table:
    table = Table("text", "SHA-256", "owner", "licence", "purposes", "personal data", "until", "by")
    for source in sources:
        terms = source.get("declaration") or {}
        approval = terms.get("approval") or {}
        cells = (
            source["name"],
            f"{source['sha256'][:12]}…",
            terms.get("owner", "undeclared"),
            terms.get("licence") or ", ".join(source["licences"]),
            ", ".join(terms.get("purposes", ())) or ("any" if terms else ""),
            terms.get("personal_data", ""),
            terms.get("retain_until") or "",
            f"{approval['by']}, {approval['on']}" if approval else "",
        )
        table.add_row(*map(escape, cells))
    return table
