"""``demo``: the whole product once, on the fixture."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.table import Table

from moe_serve.cli import options
from moe_serve.cli.output import err, out, print_json
from moe_serve.cli.progress import progress_bar
from moe_serve.demo.run import DemoRequest, DemoResult, run_demo
from moe_serve.errors import UsageError
from moe_serve.serving.variants import VARIANTS

_FIXTURES: Final = Path(__file__).parents[2] / "benchmarks" / "fixtures"


def demo_command(
    model: Annotated[Path, typer.Option(help="A trained MoE.")] = _FIXTURES / "qwen3moe-7m",
    calibration: Annotated[Path, typer.Option(help="Texts to calibrate on.")] = _FIXTURES
    / "calibration.jsonl",
    heldout: Annotated[Path, typer.Option(help="Texts to measure on.")] = _FIXTURES
    / "heldout.jsonl",
    output: Annotated[Path | None, typer.Option(help="Where to put everything.")] = None,
    keep: Annotated[float, typer.Option(help="Share of expert bytes to keep.")] = 0.5,
    as_json: options.Json = False,
) -> None:
    """Prune a trained MoE, serve both, compare, move traffic, roll back; a few minutes."""
    for place in (model, calibration, heldout):
        if not place.exists():
            raise UsageError(
                "is not there; the trained model comes with the repository, not with the package",
                where=str(place),
                remedy="run scripts/demo in a checkout, or give --model, --calibration, --heldout",
            )
    target = output or Path(tempfile.mkdtemp(prefix="moe-serve-demo-"))
    request = DemoRequest(
        model=model, calibration=calibration, heldout=heldout, output=target, keep=keep
    )
    with progress_bar() as progress:
        result = run_demo(request, lambda text: err.print(text, markup=False), progress)
    if as_json:
        print_json(result.to_json())
    else:
        out.print(comparison_table(result))
        out.print(traffic_table(result))
        _next_steps(result, request)
    if result.failed:
        raise typer.Exit(1)


def comparison_table(result: DemoResult) -> Table:
    """Original and pruned side by side."""
    table = Table("", *VARIANTS)

    def row(name: str, *values: str) -> None:
        table.add_row(name, *values)

    sizes = result.comparison
    row("expert bytes", *(f"{sizes.expert_bytes[v]:,}" for v in VARIANTS))
    row("all weight bytes", *(f"{sizes.total_bytes[v]:,}" for v in VARIANTS))
    row("process memory, MB", *(_megabytes(result, v, "rss") for v in VARIANTS))
    timing = result.timing
    row("tokens/s, one stream", *(f"{timing[v].tokens_per_second:.0f}" for v in VARIANTS))
    row("time to first token, ms", *(f"{timing[v].ttft_seconds * 1e3:.1f}" for v in VARIANTS))
    row("time between tokens, ms", *(f"{timing[v].itl_seconds * 1e3:.2f}" for v in VARIANTS))
    mean = sizes.mean
    row("KL to the original, nats", "0", f"{mean.kl_nats:.4f}")
    row("top-1 agreement", "100 %", f"{mean.top1_agreement:.1%}")
    for name, quality in sizes.domains.items():
        figures = quality.figures
        row(f"  {name}", "", f"KL {figures.kl_nats:.4f}, top-1 {figures.top1_agreement:.1%}")
    return table


def _megabytes(result: DemoResult, variant: str, kind: str) -> str:
    size = result.memory[variant].get(kind)
    return "unknown" if size is None else f"{size / 1e6:,.0f}"


def traffic_table(result: DemoResult) -> Table:
    """Who answered while traffic moved."""
    table = Table("traffic to pruned", *VARIANTS, "failed")
    for phase, counts in result.requests.items():
        failed = sum(n for who, n in counts.items() if who.startswith("failed"))
        table.add_row(phase, *(str(counts[v]) for v in VARIANTS), str(failed))
    return table


def _next_steps(result: DemoResult, request: DemoRequest) -> None:
    if result.rollback_seconds is not None:
        out.print(f"rollback in force after {result.rollback_seconds * 1000:.1f} ms")
    total = sum(sum(counts.values()) for counts in result.requests.values())
    out.print(f"{result.failed} of {total} requests failed; {result.seconds:.0f} s in all")
    pruned = result.pruned.output
    out.print(f"pruned checkpoint: {pruned}", soft_wrap=True)
    out.print(f"plan: {pruned / 'plan.json'}", soft_wrap=True)
    out.print(f"logs and record: {result.state}", soft_wrap=True)
    out.print(
        f"next: moe-serve up --original {request.model} --pruned {pruned} --state my-state",
        soft_wrap=True,
        markup=False,
    )
