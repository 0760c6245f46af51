"""``report``: one self-contained page on what was pruned and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_serve.cli import options
from moe_serve.cli.output import out, print_json
from moe_serve.files import write_atomic
from moe_serve.report.page import report


def report_command(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that moe-serve wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write.")],
    lang: Annotated[str, typer.Option(help="en or ja.")] = "en",
    quality: Annotated[
        Path | None, typer.Option(help="What moe-serve compare --json printed.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="What moe-serve prune --json printed.")] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="Of the original, where the checkpoint has no evidence.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say why each expert was kept, merged or dropped: one HTML file that loads nothing."""
    page = report(
        folder, language=lang, statistics=statistics, quality_file=quality, run_file=run
    ).encode()
    write_atomic(output, page)
    if as_json:
        print_json({"output": str(output), "bytes": len(page), "language": lang})
    else:
        out.print(f"{output}: {len(page):,} bytes", markup=False)
