"""The page of ``compare``: the same figures as its JSON, the domain that loses most first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from moe_serve.report import words
from moe_serve.report.catalogue import Catalogue
from moe_serve.report.templating import templates

_REACH: Final = 3.0
"""How far the drawing's scale goes beyond the largest KL, at most."""


def comparison_page(found: Mapping[str, Any], language: str) -> str:
    """One self-contained HTML file; whatever comes from the figures' file is escaped.

    Args:
        found: what ``compare --json`` prints.
        language: ``en`` or ``ja``.

    Raises:
        UsageError: there is no such language.
    """
    t = Catalogue.of(language)
    environment = templates(t, w=words)
    rows = sorted(
        found["quality"]["domains"].items(), key=lambda item: (-item[1]["kl_nats"], item[0])
    )
    ends = [(row["interval"] or {"high": row})["high"]["kl_nats"] for _, row in rows]
    # An interval of two documents may reach a thousand times as far as anything measured.
    highest = min(max(ends), _REACH * rows[0][1]["kl_nats"])
    return environment.get_template("compare.html").render(
        found=found,
        rows=[_row(name, row, highest) for name, row in rows],
        speed=_speed(found["speed"]) if found["speed"] else [],
        defined=[
            name for kind in ("throughput", "latency") for name in found["speed"].get(kind, ())
        ],
        answers=found.get("generation"),
        tasks=_tasks(found["tasks"], t) if found.get("tasks") else [],
        mean=_texts(found["quality"]["mean"]),
        sizes=[
            (label, sizes["original"], sizes["pruned"])
            for label, sizes in (
                (t("compare_experts"), found["memory"].get("expert_bytes")),
                (t("compare_all"), found["memory"].get("total_bytes")),
            )
            if sizes
        ],
        bound=t("compare_bound", top=found["quality"]["kl"]["top"])
        if not found["quality"]["kl"]["exact"]
        else "",
        headline=_headline(rows[0][0], rows[0][1], t),
    )


def _headline(name: str, worst: Mapping[str, Any], t: Catalogue) -> str:
    """What the worst domain loses; that nothing differs, where nothing does."""
    if worst["kl_nats"] == 0.0:
        return t("compare_same")
    return t(
        "compare_worst",
        domain=name,
        kl=words.short(worst["kl_nats"]),
        perplexity=f"{worst['perplexity_ratio']:.3f}",
        agreement=words.percent(worst["top1_agreement"]),
    )


def _tasks(found: Mapping[str, Any], t: Catalogue) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Name, metric and figures; the means of several tasks last."""
    rows = [(row["task"], row["metric"], row) for row in found["tasks"]]
    return rows + [(t("compare_tasks_mean"), name, row) for name, row in found["mean"].items()]


def _speed(found: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Name, unit and both values of each figure, under the names that the tool has for them."""
    rows = [(name, row["unit"], row) for name, row in found["throughput"].items()]
    return rows + [
        (f"{name} {statistic}", row["unit"], pair)
        for name, row in found["latency"].items()
        for statistic, pair in row["statistics"].items()
    ]


def _row(name: str, row: Mapping[str, Any], highest: float) -> dict[str, Any]:
    """One domain: its figures as text, and where they stand on a scale of 100."""
    low, high = ((row["interval"] or {end: row})[end]["kl_nats"] for end in ("low", "high"))
    scale = 100.0 / highest if highest else 0.0
    return {
        "name": name,
        "at": row["kl_nats"] * scale,
        "from": low * scale,
        "to": min(high * scale, 100.0),
        "tokens": words.number(row["tokens"]),
        **_texts(row),
    }


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    """Figures and their intervals as text; no interval of one document."""
    ends = [row["interval"][end] for end in ("low", "high")] if row["interval"] else []
    return {
        "kl": words.short(row["kl_nats"]),
        "kl_interval": " - ".join(words.short(end["kl_nats"]) for end in ends),
        "perplexity": f"{row['perplexity_ratio']:.3f}",
        "perplexity_interval": " - ".join(f"{end['perplexity_ratio']:.3f}" for end in ends),
        "agreement": words.percent(row["top1_agreement"]),
        "agreement_interval": " - ".join(words.percent(end["top1_agreement"]) for end in ends),
    }
