"""``compare``: quality and memory of a pruned checkpoint, offline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moe_serve.cli import options
from moe_serve.cli.output import err, out, print_json
from moe_serve.cli.progress import progress_bar
from moe_serve.errors import UsageError
from moe_serve.evaluation.bench import speed
from moe_serve.evaluation.comparison import Comparison, compare
from moe_serve.evaluation.generation import DEFAULT_ANSWER, generation_json, side_by_side
from moe_serve.evaluation.served import DEFAULT_CONCURRENCY, DEFAULT_TOP, compare_served
from moe_serve.files import write_atomic
from moe_serve.pruning.corpus import DEFAULT_LENGTH, DEFAULT_TOKENS, TextOptions
from moe_serve.pruning.request import DEFAULT_BATCH, device_named
from moe_serve.report.catalogue import Catalogue
from moe_serve.report.compared import comparison_page


def compare_command(
    original: Annotated[str, typer.Argument(help="The original: a directory, or an engine's URL.")],
    pruned: Annotated[str, typer.Argument(help="The pruned one, in any format, or its URL.")],
    texts: Annotated[
        list[Path], typer.Option(help="Texts to measure on: .jsonl, .txt or folders. Repeatable.")
    ],
    allow_overlap: Annotated[
        bool,
        typer.Option(
            "--allow-overlap",
            help="Directories: measure even on texts that calibration used.",
        ),
    ] = False,
    tokens: options.Tokens = DEFAULT_TOKENS,
    length: options.Length = DEFAULT_LENGTH,
    batch_tokens: options.BatchTokens = DEFAULT_BATCH,
    seed: options.Seed = 0,
    device: options.Device = None,
    top: Annotated[
        int, typer.Option(help="URLs: log-probabilities per token; more make KL's bound closer.")
    ] = DEFAULT_TOP,
    concurrency: Annotated[
        int, typer.Option(help="URLs: requests at once to each engine.")
    ] = DEFAULT_CONCURRENCY,
    prompts: Annotated[
        Path | None,
        typer.Option(help="URLs: let both go on from these prompts, greedily: .jsonl or .txt."),
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(help="With --prompts: tokens of each answer, at most.")
    ] = DEFAULT_ANSWER,
    bench: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Results of vllm bench serve: the original's, then the pruned one's."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page of the figures.")] = None,
    lang: Annotated[str, typer.Option(help="The page's language: en or ja.")] = "en",
    as_json: options.Json = False,
) -> None:
    """Measure what pruning cost: KL, perplexity and top-1 agreement per domain; memory."""
    Catalogue.of(lang)  # A wrong name must not cost a measurement.
    options_ = TextOptions(paths=tuple(texts), tokens=tokens, length=length, seed=seed)
    served = _served(original, pruned)
    if prompts is not None and not served:
        raise UsageError("needs two engines", where="--prompts", remedy="give their URLs")
    # Read before anything is measured: a wrong file must not cost an hour.
    measured = speed(*bench) if bench else {}
    with progress_bar() as progress:
        if served:
            found = compare_served(original, pruned, options_, top, concurrency, progress)
        else:
            found = compare(
                Path(original),
                Path(pruned),
                options_,
                device_named(device),
                batch_tokens,
                progress,
                allow_overlap=allow_overlap,
            )
        if prompts is not None:
            answers = side_by_side(original, pruned, prompts, answer_tokens, concurrency, progress)
            found = replace(found, generation=answers)
    found = replace(found, speed=measured)
    for name in measured.get("unlike", ()):
        err.print(f"warning: the two benchmarks differ in {name}", markup=False)
    for name in found.overlap:
        err.print(
            f"warning: {name} was used to calibrate {pruned}; measure on other texts", markup=False
        )
    if html is not None:
        write_atomic(html, comparison_page(found.to_json(), lang).encode())
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)


def _served(original: str, pruned: str) -> bool:
    """Whether both are URLs.

    Raises:
        UsageError: one of them is.
    """
    urls = {name.startswith(("http://", "https://")) for name in (original, pruned)}
    if len(urls) > 1:
        raise UsageError(
            "one is a directory and the other a URL",
            where=f"{original}, {pruned}",
            remedy="give two directories, or serve both",
        )
    return urls == {True}


def _show(found: Comparison) -> None:
    """For a person at a terminal."""
    out.print(quality_table(found))
    if found.generation:
        out.print(generation_table(found))
    if found.speed:
        out.print(speed_table(found.speed))
    if found.top is not None:
        out.print(f"KL is a lower bound, from the {found.top} likeliest tokens of each engine")
    for kind, sizes in (("routed experts", found.expert_bytes), ("all", found.total_bytes)):
        if not sizes:
            continue
        share = sizes["pruned"] / sizes["original"]
        out.print(
            f"{kind}: {sizes['original']:,} → {sizes['pruned']:,} bytes ({share:.1%})",
            markup=False,
        )


def quality_table(found: Comparison) -> Table:
    """Per domain, the one that loses most first; then the mean."""
    table = Table("domain", "KL, nats (95 %)", "perplexity ratio", "top-1 agreement", "tokens")
    for name in found.ordered:
        quality = found.domains[name]
        figures = quality.figures
        interval = "one sequence"
        if quality.low is not None and quality.high is not None:
            interval = f"{quality.low.kl_nats:.4f}-{quality.high.kl_nats:.4f}"
        table.add_row(
            name,
            f"{figures.kl_nats:.4f} ({interval})",
            f"{figures.perplexity_ratio:.4f}",
            f"{figures.top1_agreement:.2%}",
            f"{quality.tokens:,}",
        )
    mean = found.mean
    table.add_row(
        "mean",
        f"{mean.kl_nats:.4f}",
        f"{mean.perplexity_ratio:.4f}",
        f"{mean.top1_agreement:.2%}",
        "",
        style="bold",
    )
    return table


def generation_table(found: Comparison) -> Table:
    """Both engines' answers in total, and where they part."""
    totals = generation_json(found.generation)
    table = Table("answers", "mean tokens", "empty", "loops", "other script", "broken")
    for name, side in totals["answers"].items():
        table.add_row(name, f"{side['mean_tokens']:.1f}", *map(str, side["flaws"].values()))
    median = totals["median_first_divergence"]
    parts = "" if median is None else f"; the others part at token {median:g} (median)"
    table.caption = f"{totals['identical']} of {totals['prompts']} answers are identical{parts}"
    return table


def speed_table(found: Mapping[str, Any]) -> Table:
    """Each figure of both benchmarks with its unit."""
    table = Table("speed", "unit", "original", "pruned", "pruned / original")
    rows = [(name, row["unit"], row) for name, row in found["throughput"].items()]
    rows += [
        (f"{name} {statistic}", row["unit"], pair)
        for name, row in found["latency"].items()
        for statistic, pair in row["statistics"].items()
    ]
    for name, unit, pair in rows:
        values = [pair[key] for key in ("original", "pruned", "ratio")]
        table.add_row(name, unit, *("" if value is None else f"{value:.3f}" for value in values))
    table.caption = "tpot: without the first token; itl: each gap counted"
    return table
