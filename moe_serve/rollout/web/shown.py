"""What the page's templates are filled with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_serve.rollout import schema, view
from moe_serve.rollout.record import Entry
from moe_serve.rollout.said import parts
from moe_serve.rollout.store import Store
from moe_serve.rollout.web import charts
from moe_serve.rollout.web.words import (
    Words,
    change,
    count,
    percent,
    short,
    signed,
    size,
)

_NOTABLE: Final = frozenset({"intended", "paused", "resumed", "dry-run", "unrecorded"})
_LINES: Final = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardCard:
    """One guard."""

    key: str
    title: str
    verdict: str
    """``harm``, ``fine``, ``open``, or empty for one of which only the past is known."""
    interval: str
    margin: str
    limit: str
    """Empty where it is the margin."""
    pruned: str
    original: str
    basis: str
    low: str
    """The axis' ends."""
    high: str
    bar: charts.Bar | None
    band: charts.Band | None
    since: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measure of both variants."""

    label: str
    original: str
    pruned: str
    difference: str
    tone: str
    """``better`` or ``worse`` where that is certain, else empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One decision."""

    id: int
    at: float
    what: str
    tone: str
    actor: str
    words: str
    split: str
    fate: str
    evidence: tuple[schema.Guard, ...]


def figure(unit: str, value: float, words: Words, *, sign: bool = True) -> str:
    """A difference in its unit."""
    nats = unit == "nats"
    scaled = value if nats else 100.0 * value
    digits = 3 if nats else 2
    text = signed(scaled, digits) if sign else f"{scaled:.{digits}f}"
    return f"{text} {words('nats' if nats else 'points')}"


def waits(decision: schema.DecisionOut | None, words: Words) -> list[str]:
    """What a decision says, one thing each, under the names that the page's guards have."""
    if decision is None:
        return []
    if decision.codes is None:
        return [decision.words]
    return [words.say(part, "") for part in parts(decision.codes)]


def cards(found: schema.Guards, words: Words) -> list[GuardCard]:
    """All guards, those of the present step first."""
    return [_card(guard, words) for guard in found.guards]


def _card(found: schema.GuardHistory, words: Words) -> GuardCard:
    now, points, name = found.now, found.points, found.guard
    last = points[-1] if points else None
    lower, upper, margin = next(
        ((x.lower, x.upper, x.margin) for x in (now, last) if x is not None), (0.0, 0.0, 1.0)
    )

    def said(value: float) -> str:
        return figure(found.unit, value, words)

    def counts(pair: tuple[float, float] | None) -> str:
        if pair is None or now is None or now.said:
            return ""
        return words("of", events=count(pair[0]), trials=count(pair[1]))

    different = now is not None and abs(now.limit - margin) > 1e-12
    return GuardCard(
        key=name,
        title=words(f"guard-{name}"),
        verdict=now.verdict if now is not None else "",
        interval=words("interval", lower=said(lower), upper=said(upper)),
        margin=figure(found.unit, margin, words, sign=False),
        limit=words("limit", limit=figure(found.unit, now.limit, words, sign=False))
        if now is not None and different
        else "",
        pruned=counts(now.pruned) if now is not None else "",
        original=counts(now.original) if now is not None else "",
        basis=" · ".join(
            words.say(now.codes.get(part), getattr(now, part))
            for part in ("said", "basis", "needs")
            if getattr(now, part)
        )
        if now is not None
        else "",
        low=figure(found.unit, -2.0 * margin, words),
        high=figure(found.unit, 3.0 * margin, words),
        bar=charts.bar(lower, upper, margin) if now is not None else None,
        band=charts.band(points, margin),
        since=(points[0].at, points[-1].at) if points else None,
    )


def rows(found: schema.Variants, words: Words) -> list[Row]:
    """Memory, throughput and latency side by side."""
    original, pruned = found.variants

    def row(key: str, name: str, form: Any, compare: str = "ratio", part: str = "") -> Row:
        pair = []
        for variant in (original, pruned):
            value = getattr(variant, name)
            pair.append(getattr(value, part) if part and value is not None else value)
        before, after = pair
        difference = tone = ""
        if compare == "points" and before is not None and after is not None:
            difference = f"{signed(100.0 * (after - before), 2)} {words('points')}"
        elif compare:
            difference = change(before, after)
        if compare in ("less", "more") and before and after is not None and before != after:
            tone = "better" if (after < before) == (compare == "less") else "worse"
        return Row(
            label=words(key),
            original=form(before),
            pruned=form(after),
            difference=difference,
            tone=tone,
        )

    # How much each serves is the split's doing, and whether a latency differs is for the guards.
    return [
        row("weights", "weight_bytes", size, "less"),
        row("cache", "cache_bytes", size),
        row("cache-tokens", "cache_tokens", count, "more"),
        row("held", "held_bytes", size),
        row("requests", "requests_per_second", count, ""),
        row("generated", "generated_per_second", count, ""),
        row("failed", "failed_share", percent, "points"),
        row("first", "first_token", short, part="p50"),
        row("first-95", "first_token", short, part="p95"),
        row("between", "between_tokens", short, part="p50"),
        row("between-95", "between_tokens", short, part="p95"),
    ]


def quality(found: schema.Variants, words: Words) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Headings, and per domain the figures; empty where nothing is probed."""
    names = sorted(found.quality, key=lambda name: (name == "probes", name))
    domains = sorted({domain for values in found.quality.values() for domain in values})
    table = [
        (domain, [_quality(name, found.quality[name].get(domain)) for name in names])
        for domain in domains
    ]
    return [words(f"q-{name}") for name in names], table


def _quality(name: str, value: float | None) -> str:
    if value is not None and name.endswith("_nats"):
        return f"{value:.4f}"
    return percent(value) if name.endswith("_ratio") else count(value)


def lines(state: Path, before: int | None, words: Words) -> tuple[list[Line], int | None]:
    """A page of decisions, newest first, and where the next page begins.

    Raises:
        RolloutError: the record can't be read.
    """
    store, at = Store(state), before
    found: list[Entry] = []
    while len(found) <= _LINES:
        batch = store.log(100, before=at)
        found += [entry for entry in batch if entry.kind in _NOTABLE]
        if len(batch) < 100:
            break
        at = batch[-1].id
    more = found[_LINES - 1].id if len(found) > _LINES else None
    return [_line(entry, words) for entry in found[:_LINES]], more


def _line(entry: Entry, words: Words) -> Line:
    body, done = entry.body, entry.change
    if done is None:
        reason = str(body.get("words") or body.get("reason") or "")
        evidence: Mapping[str, Any] = body
        what, split, fate = entry.kind, "", ""
    else:
        reason, evidence, what = done.reason, done.evidence, done.decision
        start = "?" if done.percent_before is None else f"{done.percent_before:g}"
        split, fate = f"{start} → {done.percent_after:g} %", _fate(entry, words)
    tones = {"rollback": "bad", "unrecorded": "bad", "promote": "good", "advance": "good"}
    return Line(
        id=entry.id,
        at=float(body.get("at", 0.0)),
        what=words(f"did-{what}"),
        tone=tones.get(what, ""),
        actor=words("by", actor=body.get("actor", "controller")),
        words=words.say(evidence.get("codes"), reason),
        split=split,
        fate=fate,
        evidence=tuple(
            schema.Guard.model_validate(guard) for guard in evidence.get("evidence") or ()
        ),
    )


def _fate(entry: Entry, words: Words) -> str:
    done = entry.change
    if done is None:
        return ""
    if done.abandoned_at is not None:
        return words("abandoned")
    if done.confirmed_at is None or done.written_at is None:
        return words("unconfirmed")
    return words("confirmed", span=short(done.confirmed_at - done.at))


def page(state: Path, found: schema.Variants, words: Words, before: int | None) -> dict[str, Any]:
    """Everything that the page shows.

    Raises:
        RolloutError: state, record or routes can't be read.
    """
    status = view.look(state)
    heads, domains = quality(found, words)
    decided, older = lines(state, before, words)
    return {
        "status": status,
        "waits": waits(status.decision, words),
        "why": words.say(status.reason_codes, status.reason),
        "spent": status.step_seconds,
        "guards": cards(view.guards(state, 240), words),
        "variants": found,
        "rows": rows(found, words),
        "quality_heads": heads,
        "quality": domains,
        "decisions": decided,
        "older": older,
        "state_dir": str(state),
    }
