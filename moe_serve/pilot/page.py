"""The manager's page: one self-contained HTML file, in one language."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from moe_serve.pilot.decision import (
    Money,
    Option,
    Recommendation,
    front,
    knee,
    misses,
    money,
    recommend,
)
from moe_serve.pilot.run import Pilot
from moe_serve.report import words
from moe_serve.report.catalogue import Catalogue
from moe_serve.report.templating import templates
from moe_serve.version import __version__

_FEW_TOKENS: Final = 2000
"""Fewer measured tokens than this and a domain's figure is a guess."""
_WIDTH, _HEIGHT = 640.0, 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One option with what follows from it."""

    option: Option
    money: Money
    share: float
    within: bool


def page(pilot: Pilot, language: str) -> str:
    """Render.

    Raises:
        UsageError: there is no such language.
    """
    t = Catalogue.of(language, "moe_serve.pilot")
    settings, baseline = pilot.settings, pilot.baseline
    advice = recommend(pilot.options, settings)
    shown = advice.option or advice.nearest
    rows = [
        Row(
            option=option,
            money=money(option, baseline, settings),
            share=option.total_bytes / baseline.total_bytes,
            within=not misses(option, settings.tolerance),
        )
        for option in pilot.options
    ]
    row = next(row for row in rows if row.option is shown)
    environment = templates(t, "moe_serve.pilot", w=words, hours=_hours, amount=_amount)
    return environment.get_template("pilot.html").render(
        name=settings.model.name,
        version=__version__,
        settings=settings,
        baseline=baseline,
        advice=advice,
        reasons=_reasons(pilot, advice, t),
        tiles=_tiles(pilot, row, t),
        risks=_risks(pilot, advice, t),
        rows=rows,
        bend=knee(pilot.options, baseline),
        plot=_plot(pilot),
    )


def _hours(hours: float) -> str:
    return f"{hours:.2f}" if hours < 10 else f"{hours:,.0f}"


def _amount(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"


def _tiles(pilot: Pilot, row: Row, t: Catalogue) -> list[dict[str, str]]:
    """Memory, quality, hours, money of the option that is spoken of."""
    option, cost, baseline = row.option, row.money, pilot.baseline
    if cost.monthly is None:
        note = t("cost_unknown")
    elif cost.payback_months is None:
        note = t("cost_saves_none")
    else:
        note = t(
            "cost_saves",
            monthly=_amount(cost.monthly),
            currency=pilot.settings.prices.currency,
            gpus=cost.gpus_saved,
            months=_amount(cost.payback_months),
        )
    return [
        {
            "name": t("memory"),
            "figure": words.percent(1 - row.share),
            "note": t(
                "memory_note",
                before=words.size(baseline.total_bytes),
                after=words.size(option.total_bytes),
                experts=words.percent(option.expert_bytes / baseline.expert_bytes),
            ),
        },
        {
            "name": t("loss"),
            "figure": t("loss_figure", kl=words.short(option.mean_kl)),
            "note": t(
                "loss_note",
                worst=words.short(option.worst_kl),
                domain=option.worst_domain,
                top1=words.percent(option.top1),
            ),
        },
        {
            "name": t("hours"),
            "figure": t(
                "hours_figure",
                machine=_hours(cost.machine_hours),
                people=words.short(cost.person_hours),
            ),
            "note": t("hours_note"),
        },
        {
            "name": t("cost"),
            "figure": f"{_amount(cost.once)} {pilot.settings.prices.currency}",
            "note": note,
        },
    ]


def _reasons(pilot: Pilot, advice: Recommendation, t: Catalogue) -> list[str]:
    """Why this option, each from the figures."""
    option, settings = advice.option, pilot.settings
    if option is None:
        return []
    tolerance = settings.tolerance
    found = [
        t(
            "reason_tolerance",
            mean=words.short(option.mean_kl),
            mean_limit=f"{tolerance.mean_kl_nats:g}",
            worst=words.short(option.worst_kl),
            worst_limit=f"{tolerance.worst_kl_nats:g}",
            domain=option.worst_domain,
        )
    ]
    if advice.fewest_gpus is None:
        found.append(t("reason_no_gpus"))
    else:
        found.append(
            t(
                "reason_gpus",
                gpus=advice.fewest_gpus,
                memory=words.size(settings.hardware.memory),
                original=pilot.baseline.gpus or "> 64",
                count=advice.candidates,
            )
        )
    found.append(t("reason_memory") if settings.prefer == "memory" else t("reason_quality"))
    bend = knee(pilot.options, pilot.baseline)
    if bend is option:
        found.append(t("reason_knee"))
    elif bend is not None:
        found.append(t("reason_not_knee", name=bend.name))
    return found


def _risks(pilot: Pilot, advice: Recommendation, t: Catalogue) -> list[str]:
    option = advice.option or advice.nearest
    found = []
    if not pilot.covered:
        found.append(t("risk_no_texts"))
    elif missing := sorted(option.domains.keys() - set(pilot.covered)):
        found.append(t("risk_uncovered", domains=", ".join(missing)))
    if pilot.undeclared:
        found.append(t("risk_undeclared", files=", ".join(pilot.undeclared)))
    if advice.uncertain:
        limit = pilot.settings.tolerance.worst_kl_nats
        found.append(
            t("risk_uncertain", high=words.short(option.worst_kl_high), limit=f"{limit:g}")
        )
    if option.overlap:
        found.append(t("risk_overlap", files=", ".join(option.overlap)))
    few = sorted(
        name
        for name, quality in option.domains.items()
        if quality["tokens"] < _FEW_TOKENS or quality["interval"] is None
    )
    if few:
        found.append(t("risk_few", domains=", ".join(few)))
    return found


def _plot(pilot: Pilot) -> dict[str, Any]:
    """Places in a drawing of 640 by 300, its margins included."""
    left, right, top, bottom = 60.0, 20.0, 34.0, 46.0
    total = pilot.baseline.total_bytes
    highest = max(option.mean_kl for option in pilot.options) * 1.1 or 1.0
    lowest = min(option.total_bytes / total for option in pilot.options)
    lowest = max(0.0, lowest - 0.05)

    def x(share: float) -> float:
        return left + (share - lowest) / (1.0 - lowest) * (_WIDTH - left - right)

    def y(kl: float) -> float:
        return _HEIGHT - bottom - kl / highest * (_HEIGHT - top - bottom)

    line = [(1.0, 0.0), *((o.total_bytes / total, o.mean_kl) for o in front(pilot.options))]
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "line": " ".join(f"{x(s):.1f},{y(k):.1f}" for s, k in line),
        "points": [
            _point(x(o.total_bytes / total), y(o.mean_kl)) | {"option": o} for o in pilot.options
        ],
        "origin": (x(1.0), y(0.0)),
        "xs": [(x(s), words.percent(s)) for s in _ticks(lowest, 1.0)],
        "ys": [(y(k), f"{k:g}") for k in _ticks(0.0, highest)],
        "left": left,
        "base": _HEIGHT - bottom,
    }


def _point(x: float, y: float) -> dict[str, Any]:
    """A point and its label, on the side where the line that falls to the right is not."""
    if x < 0.6 * _WIDTH:
        return {"x": x, "y": y, "label_x": x + 9, "label_y": y - 9, "anchor": "start"}
    return {"x": x, "y": y, "label_x": x - 7, "label_y": y + 19, "anchor": "end"}


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values between both ends: multiples of 1, 2, 2.5 or 5 tens."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1.0, 2.0, 2.5, 5.0, 10.0) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]
