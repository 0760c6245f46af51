"""``compare``: what pruning cost, of two models by directory or URL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moe_serve.cli import options
from moe_serve.cli.compared import show
from moe_serve.cli.output import err, print_json
from moe_serve.cli.progress import progress_bar
from moe_serve.errors import UsageError
from moe_serve.evaluation.bench import speed as results_of
from moe_serve.evaluation.generation import DEFAULT_ANSWER
from moe_serve.evaluation.load import Load
from moe_serve.evaluation.measure import Wanted, measure
from moe_serve.evaluation.served import DEFAULT_CONCURRENCY, DEFAULT_TOP
from moe_serve.files import write_atomic
from moe_serve.pruning.corpus import (
    DEFAULT_LENGTH,
    DEFAULT_TOKENS,
    TextOptions,
)
from moe_serve.pruning.device import device_named
from moe_serve.pruning.request import DEFAULT_BATCH
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
    skip_overlap: Annotated[
        bool,
        typer.Option(
            "--skip-overlap",
            help="Leave out documents that the pruned directory was calibrated on, and say how "
            "many.",
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
        typer.Option(
            help="Results of one load generator (vllm bench serve, GuideLLM, AIPerf or "
            "inference-perf): the original's, then the pruned one's."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="lm-eval's tasks (extra evaluation): a directory of task files, a file, or names "
            "it knows. Repeatable."
        ),
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(help="With --tasks: items of each task, at most.")
    ] = None,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed",
            help="Also measure memory and load time of directories; of two engines throughput and "
            "latency, asked in turn.",
        ),
    ] = False,
    speed_requests: Annotated[
        int, typer.Option(help="With --speed: requests to each engine.")
    ] = Load().requests,
    save_bench: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="With --speed: write both results as vllm bench serve does."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page of the figures.")] = None,
    lang: Annotated[str, typer.Option(help="The page's language: en or ja.")] = "en",
    as_json: options.Json = False,
) -> None:
    """Measure what pruning cost: KL, perplexity and top-1 agreement per domain; memory."""
    Catalogue.of(lang)  # A wrong name must not cost a measurement.
    wanted = Wanted(
        original=original,
        pruned=pruned,
        texts=TextOptions(paths=tuple(texts), tokens=tokens, length=length, seed=seed),
        allow_overlap=allow_overlap,
        skip_overlap=skip_overlap,
        device=device_named(device),
        batch_tokens=batch_tokens,
        top=top,
        concurrency=concurrency,
        tasks=tuple(tasks or ()),
        task_limit=task_limit,
        prompts=prompts,
        answer_tokens=answer_tokens,
        load=Load(requests=speed_requests, answer_tokens=answer_tokens, concurrency=concurrency)
        if speed
        else None,
        results=save_bench,
    )
    if speed and bench:
        raise UsageError("contradict each other", where="--speed, --bench", remedy="give one")
    # Read before anything is measured: a wrong file must not cost an hour.
    measured = results_of(*bench) if bench else {}
    with progress_bar() as progress:
        found = measure(wanted, progress)
    found = replace(found, speed=measured or found.speed)
    for name in found.speed.get("unlike", ()):
        err.print(f"warning: the two benchmarks differ in {name}", markup=False)
    for side, count in found.speed.get("failed", {}).items():
        if count:
            err.print(f"warning: {count} requests to the {side} failed", markup=False)
    for name in (*found.overlap, *found.tasks.get("overlap", ())):
        err.print(
            f"warning: {name} was used to calibrate {pruned}; measure on other texts", markup=False
        )
    if html is not None:
        write_atomic(html, comparison_page(found.to_json(), lang).encode())
    if as_json:
        print_json(found.to_json())
    else:
        show(found)
