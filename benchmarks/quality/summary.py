"""From single runs to the table: means over seeds, best peers, ratios to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One contestant at one budget with one seed; KL in nats per predicted token."""

    label: str
    kind: str
    keep: float
    seed: int
    bytes_kept: float
    """Share of the routed experts' bytes that the output holds."""
    kl_mean: float
    kl_worst: float
    worst_domain: str
    top1: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One contestant at one budget over all seeds."""

    label: str
    kind: str
    keep: float
    seeds: int
    bytes_kept: float
    kl_mean: float
    kl_worst: float
    spread: float
    """Standard deviation of the mean KL over seeds; zero with one."""
    top1: float
    ratios: dict[str, tuple[float, float]]
    """Kind of peer → (mean KL over the best such peer's, worst-domain KL likewise)."""


def summarise(runs: Sequence[Run], keep: float) -> tuple[list[Row], dict[str, dict[str, str]]]:
    """Rows of one budget, the best first, and who the best peers are.

    Returns:
        (rows, kind of peer → {"kl_mean": label, "kl_worst": label})
    """
    rows = _rows([run for run in runs if run.keep == keep])
    best: dict[str, dict[str, Row]] = {}
    for kind in ("expert peer", "neuron peer"):
        peers = [row for row in rows if row.kind == kind]
        if peers:
            best[kind] = {
                "kl_mean": min(peers, key=lambda row: row.kl_mean),
                "kl_worst": min(peers, key=lambda row: row.kl_worst),
            }
    for row in rows:
        for kind, leader in best.items():
            row.ratios[kind] = (
                row.kl_mean / leader["kl_mean"].kl_mean,
                row.kl_worst / leader["kl_worst"].kl_worst,
            )
    names = {kind: {k: row.label for k, row in of.items()} for kind, of in best.items()}
    return sorted(rows, key=lambda row: row.kl_mean), names


def _rows(runs: Sequence[Run]) -> list[Row]:
    rows = []
    for label in dict.fromkeys(run.label for run in runs):
        own = [run for run in runs if run.label == label]

        def mean(name: str, own: list[Run] = own) -> float:
            return float(np.mean([getattr(run, name) for run in own]))

        rows.append(
            Row(
                label=label,
                kind=own[0].kind,
                keep=own[0].keep,
                seeds=len(own),
                bytes_kept=mean("bytes_kept"),
                kl_mean=mean("kl_mean"),
                kl_worst=mean("kl_worst"),
                spread=float(np.std([r.kl_mean for r in own], ddof=1)) if len(own) > 1 else 0.0,
                top1=mean("top1"),
                ratios={},
            )
        )
    return rows


def markdown(rows: Sequence[Row], best: dict[str, dict[str, str]]) -> str:
    """A table, and a line that names the best peers."""
    kinds = list(best)
    heads = [f"x best {kind} (mean / worst)" for kind in kinds]
    columns = ["method", "kind", "bytes", "KL mean", "± seeds", "KL worst domain", "top-1", *heads]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [
            row.label,
            row.kind,
            f"{row.bytes_kept:.1%}",
            f"{row.kl_mean:.4f}",
            f"{row.spread:.4f}",
            f"{row.kl_worst:.4f}",
            f"{row.top1:.1%}",
            *(f"{row.ratios[kind][0]:.3f} / {row.ratios[kind][1]:.3f}" for kind in kinds),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    names = [
        f"best {kind}: {of['kl_mean']} (mean), {of['kl_worst']} (worst domain)"
        for kind, of in best.items()
    ]
    return "\n".join([*lines, "", *names])


def to_json(runs: Sequence[Run], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything measured and everything concluded."""
    tables = []
    for keep in sorted({run.keep for run in runs}, reverse=True):
        rows, best = summarise(runs, keep)
        tables.append({"keep": keep, "best": best, "rows": [asdict(row) for row in rows]})
    return {"settings": settings, "runs": [asdict(run) for run in runs], "tables": tables}
