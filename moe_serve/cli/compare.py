"""``compare``: quality and memory of a pruned checkpoint, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from moe_serve.cli import options
from moe_serve.cli.output import err, out, print_json
from moe_serve.cli.progress import progress_bar
from moe_serve.errors import UsageError
from moe_serve.evaluation.comparison import Comparison, compare
from moe_serve.evaluation.served import DEFAULT_CONCURRENCY, DEFAULT_TOP, compare_served
from moe_serve.files import write_atomic
from moe_serve.pruning.request import (
    DEFAULT_BATCH,
    DEFAULT_LENGTH,
    DEFAULT_TOKENS,
    TextOptions,
    device_named,
)
from moe_serve.report.catalogue import Catalogue
from moe_serve.report.compared import comparison_page


def compare_command(
    original: Annotated[str, typer.Argument(help="The original: a directory, or an engine's URL.")],
    pruned: Annotated[str, typer.Argument(help="The pruned one, in any format, or its URL.")],
    texts: Annotated[
        list[Path], typer.Option(help="Texts to measure on: .jsonl, .txt or folders. Repeatable.")
    ],
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
    html: Annotated[Path | None, typer.Option(help="Also write a page of the figures.")] = None,
    lang: Annotated[str, typer.Option(help="The page's language: en or ja.")] = "en",
    as_json: options.Json = False,
) -> None:
    """Measure what pruning cost: KL, perplexity and top-1 agreement per domain; memory."""
    Catalogue.of(lang)  # A wrong name must not cost a measurement.
    options_ = TextOptions(paths=tuple(texts), tokens=tokens, length=length, seed=seed)
    urls = [name.startswith(("http://", "https://")) for name in (original, pruned)]
    if any(urls) and not all(urls):
        raise UsageError(
            "one is a directory and the other a URL",
            where=f"{original}, {pruned}",
            remedy="give two directories, or serve both",
        )
    with progress_bar() as progress:
        if all(urls):
            found = compare_served(original, pruned, options_, top, concurrency, progress)
        else:
            found = compare(
                Path(original),
                Path(pruned),
                options_,
                device_named(device),
                batch_tokens,
                progress,
            )
    for name in found.overlap:
        err.print(
            f"warning: {name} was used to calibrate {pruned}; measure on other texts", markup=False
        )
    if html is not None:
        write_atomic(html, comparison_page(found.to_json(), lang).encode())
    if as_json:
        print_json(found.to_json())
    else:
        out.print(quality_table(found))
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
