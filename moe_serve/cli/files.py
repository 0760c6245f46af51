"""``export`` and ``verify``: what is already written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from moe_serve.checkpoint.export import export
from moe_serve.cli import options
from moe_serve.cli.output import out, print_json
from moe_serve.cli.progress import progress_bar
from moe_serve.pruning.records.verify import verify
from moe_serve.serving.twin import BOUND, compare_with_twin


def export_command(
    source: Annotated[Path, typer.Argument(help="A compact checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Directory to make.")],
    form: Annotated[
        str,
        typer.Option(
            "--format", help="tied or native.", autocompletion=options.words("native", "tied")
        ),
    ],
    as_json: options.Json = False,
) -> None:
    """Write a compact checkpoint in another format."""
    with progress_bar() as progress:
        export(source, output, form, progress)
    if as_json:
        print_json({"output": str(output), "format": form})
    else:
        out.print(f"{output}: {form}")


def verify_command(
    folder: Annotated[Path, typer.Argument(help="A checkpoint written by moe-serve.")],
    original: Annotated[Path | None, typer.Option(help="What it was made from.")] = None,
    engine: Annotated[
        bool,
        typer.Option("--engine", help="Also serve it and its tied form, and compare the answers."),
    ] = False,
    bound: Annotated[
        float, typer.Option(help="Largest difference of a log-probability for --engine, in nats.")
    ] = BOUND,
    as_json: options.Json = False,
) -> None:
    """Check hashes, structure, table and numbers; with the original, the weights too."""
    with progress_bar() as progress:
        found = verify(folder, original, progress)
        agreement = compare_with_twin(folder, progress) if engine and found.passed else None
    if agreement is not None:
        line = (
            f"{agreement.tokens} log-probabilities in vLLM, the furthest "
            f"{agreement.difference:.1e} nats from the tied form's (bound {bound:g})"
        )
        (found.checked if agreement.difference <= bound else found.problems).append(line)
    if as_json:
        apart = {} if agreement is None else {"engine": dataclasses.asdict(agreement)}
        print_json(found.to_json() | apart)
    else:
        for line in found.checked:
            out.print(f"checked: {line}", markup=False)
        for line in found.problems:
            out.print(f"PROBLEM: {line}", markup=False, style="bold red")
        out.print("sound" if found.passed else f"{len(found.problems)} problems")
    if not found.passed:
        raise typer.Exit(1)
