"""A comparison's figures as tables at a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from moe_serve.cli.output import out
from moe_serve.evaluation.comparison import Comparison
from moe_serve.evaluation.generation import generation_json
from moe_serve.evaluation.paired import UNSETTLED
from moe_serve.evaluation.quality import Figures
from moe_serve.evaluation.results import DEFINITIONS
from moe_serve.report import words


def show(found: Comparison) -> None:
    """For a person at a terminal."""
    out.print(quality_table(found))
    if found.generation:
        out.print(generation_table(found))
    if found.tasks:
        out.print(tasks_table(found.tasks))
    if found.held:
        out.print(held_table(found.held))
    if found.speed:
        out.print(speed_table(found.speed))
    for name, count in found.left_out.items():
        out.print(f"{name}: documents that were calibrated on and left out: {count}", markup=False)
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
        table.add_row(
            name,
            f"{figures.kl_nats:.4f} ({_ends(quality.interval) or 'one document'})",
            f"{figures.perplexity_ratio:.4f}",
            f"{figures.top1_agreement:.2%}",
            f"{quality.tokens:,}",
        )
    mean, ends = found.mean, _ends(found.mean_interval)
    table.add_row(
        "mean",
        f"{mean.kl_nats:.4f} ({ends})" if ends else f"{mean.kl_nats:.4f}",
        f"{mean.perplexity_ratio:.4f}",
        f"{mean.top1_agreement:.2%}",
        "",
        style="bold",
    )
    return table


def _ends(interval: tuple[Figures, Figures] | None) -> str:
    """Of KL; nothing where there is none."""
    return f"{interval[0].kl_nats:.4f}-{interval[1].kl_nats:.4f}" if interval else ""


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
    names = [*found["throughput"], *found["latency"]]
    table.caption = "\n".join([found["tool"], *(f"{n}: {DEFINITIONS[n]}" for n in names)])
    table.caption_justify = "left"
    return table


def tasks_table(found: Mapping[str, Any]) -> Table:
    """Each task's difference with its interval; shares in points of 100."""
    table = Table("task", "metric", "original", "pruned", "difference (95 %)", "p", "items")
    rows = [(row["task"], row["metric"], row) for row in found["tasks"]]
    rows += [("mean", metric, row) for metric, row in found["mean"].items()]
    for task, metric, row in rows:
        share = row["only_original"] is not None
        table.add_row(
            task,
            f"{metric} (%)" if share else metric,
            words.measured(row["original"], share),
            words.measured(row["pruned"], share),
            f"{words.apart(row)} {row['verdict'] if row['verdict'] != UNSETTLED else ''}".rstrip(),
            words.short(row["p"]),
            words.counted(row),
        )
    table.caption = "item by item; p: McNemar's exact test where items are right or wrong, else t"
    return table


def held_table(found: Mapping[str, Any]) -> Table:
    """Memory and load time, and how they were measured."""
    table = Table("memory and loading", "original", "pruned")
    for name, row in found.items():
        table.add_row(name, *(words.of_unit(name, row[side]) for side in ("original", "pruned")))
    table.caption = "\n".join(f"{name}: {row['definition']}" for name, row in found.items())
    table.caption_justify = "left"
    return table
