"""The manager's page: one self-contained HTML file, in one language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from moe_serve.pilot.decision import (
    Money,
    Option,
    Recommendation,
    knee,
    misses,
    money,
    recommend,
)
from moe_serve.pilot.plot import plot
from moe_serve.pilot.run import Pilot
from moe_serve.report import words
from moe_serve.report.catalogue import Catalogue
from moe_serve.report.templating import templates
from moe_serve.version import __version__

_FEW_TOKENS: Final = 2000
"""Fewer measured tokens than this and a domain's figure is a guess."""


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
        plot=_plot(pilot, advice, knee(pilot.options, baseline), t),
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
    elif cost.gpus_saved and not cost.monthly:
        note = t("cost_no_price", gpus=cost.gpus_saved)
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
            "figure": words.percent(option.top1),
            "note": t(
                "loss_note",
                kl=words.short(option.mean_kl),
                worst=words.short(option.worst_kl),
                domain=option.worst_domain,
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
    if settings.prefer == "memory":
        found.append(t("reason_memory"))
    elif advice.alike:
        names = t("join_list").join(other.name for other in advice.alike)
        found.append(t("reason_quality_alike", names=names))
    else:
        found.append(t("reason_quality"))
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
    if advice.uncertain_mean:
        limit = pilot.settings.tolerance.mean_kl_nats
        found.append(
            t("risk_uncertain_mean", high=words.short(option.mean_kl_high), limit=f"{limit:g}")
        )
    if option.overlap:
        found.append(t("risk_overlap", files=", ".join(option.overlap)))
    found += [t("risk_left_out", file=f, count=n) for f, n in option.left_out.items()]
    few = sorted(
        name
        for name, quality in option.domains.items()
        if quality["tokens"] < _FEW_TOKENS or quality["interval"] is None
    )
    if few:
        found.append(t("risk_few", domains=", ".join(few)))
    return found


def _plot(
    pilot: Pilot, advice: Recommendation, bend: Option | None, t: Catalogue
) -> dict[str, Any]:
    """Each option by its name, and what is special about it."""
    labels = [
        " · ".join(
            [option.name]
            + ([t("recommended")] if option is advice.option else [])
            + ([t("knee")] if option is bend else [])
        )
        for option in pilot.options
    ]
    return plot(pilot.options, pilot.baseline, labels, t("original"))
