"""What a manager reads: savings, quality, time, risks; and the rows of the short tables."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from moe_serve.calibration.governance import undeclared
from moe_serve.report import words
from moe_serve.report.catalogue import Catalogue
from moe_serve.report.facts import STATES, Facts

_UNEVEN: Final = 1.5
"""The worst domain is a risk of its own from so many times the mean on."""


def done(facts: Facts, t: Catalogue) -> str:
    """What was done, in a few sentences."""
    counts = Counter(e.state for e in facts.experts)
    size = facts.manifest.expert_bytes
    sentences = [
        t(
            "done",
            experts=words.number(len(facts.experts)),
            layers=len(facts.layers),
            changed=words.number(len(facts.experts) - counts["whole"]),
            kept=words.percent(size.kept / size.original),
        ),
        t(
            "counts",
            counts=t("join_list").join(
                f"{t('state_' + s)} {words.number(counts[s])}" for s in STATES if counts[s]
            ),
        ),
    ]
    if facts.manifest.refit:
        sentences.append(t("refit_done"))
    sentences += [t(f"term_{state}") for state in STATES if counts[state] and state != "whole"]
    return t("join_sentences").join(sentences)


def tiles(facts: Facts, t: Catalogue) -> list[dict[str, str]]:
    """The figures of management: memory, what was kept, quality, time."""
    return [_memory(facts, t), _kept(facts, t), _agreement(facts, t), _time(facts, t)]


def _memory(facts: Facts, t: Catalogue) -> dict[str, str]:
    saved = facts.saved_bytes
    note = t(
        "tile_memory_note",
        before=words.size(facts.total_bytes + saved),
        after=words.size(facts.total_bytes),
    )
    return {
        "name": t("tile_memory"),
        "figure": words.size(saved),
        "note": note if saved else t("tile_memory_tied"),
    }


def _kept(facts: Facts, t: Catalogue) -> dict[str, str]:
    size = facts.manifest.expert_bytes
    note = t("tile_experts_note", kept=words.size(size.kept), original=words.size(size.original))
    return {
        "name": t("tile_experts"),
        "figure": words.percent(size.kept / size.original),
        "note": note,
    }


def _agreement(facts: Facts, t: Catalogue) -> dict[str, str]:
    name = t("tile_quality")
    if facts.quality is None:
        return {"name": name, "figure": t("unmeasured"), "note": t("tile_quality_missing")}
    found = facts.quality["quality"]
    worst = found["worst_domain"]
    return {
        "name": name,
        "figure": words.percent(found["mean"]["top1_agreement"]),
        "note": t(
            "tile_quality_note",
            kl=f"{found['mean']['kl_nats']:.3f}",
            worst=f"{worst['kl_nats']:.3f}",
            domain=worst["domain"],
        ),
    }


def _time(facts: Facts, t: Catalogue) -> dict[str, str]:
    if facts.run is None:
        note = t("tile_time_missing")
        return {"name": t("tile_time"), "figure": t("unmeasured"), "note": note}
    seconds = facts.run["seconds"]
    note = t(
        "tile_time_note",
        peak=words.size(facts.run["peak_rss_bytes"]),
        **{phase: words.duration(seconds[phase]) for phase in ("calibrate", "plan", "apply")},
    )
    return {
        "name": t("tile_time"),
        "figure": words.duration(sum(seconds.values())),
        "note": note,
    }


def risks(facts: Facts, t: Catalogue) -> list[str]:
    """What may go wrong, each with what to do about it."""
    found = []
    if facts.quality is None:
        found.append(t("risk_unmeasured"))
    else:
        found += _quality_risks(facts.quality, t)
    if facts.manifest.calibration is None and facts.manifest.statistics_sha256 is None:
        found.append(t("risk_no_texts"))
    elif not facts.evidence.layers:
        found.append(t("risk_no_evidence"))
    if nameless := undeclared(facts.manifest.sources()):
        found.append(t("risk_undeclared", files=", ".join(nameless)))
    for domain, tokens in facts.thin_domains.items():
        found.append(t("risk_thin", domain=domain, tokens=words.number(tokens)))
    if starved := facts.starved:
        examples = ", ".join(f"L{e.layer} E{e.index}" for e in starved[:3])
        width = facts.evidence.width
        found.append(t("risk_starved", count=len(starved), width=width, examples=examples))
    if gone := sum(e.kept == 0 and e.state != "constant" for e in facts.experts):
        found.append(t("risk_gone", count=gone))
    return found


def _quality_risks(measured: dict[str, Any], t: Catalogue) -> list[str]:
    found = []
    mean, worst = measured["quality"]["mean"]["kl_nats"], measured["quality"]["worst_domain"]
    if worst["kl_nats"] > _UNEVEN * mean > 0:
        ratio = f"{worst['kl_nats'] / mean:.1f}"
        kl = f"{worst['kl_nats']:.3f}"
        found.append(t("risk_worst", domain=worst["domain"], kl=kl, ratio=ratio))
    if overlap := measured.get("overlap"):
        found.append(t("risk_overlap", files=", ".join(overlap)))
    return found


def quality(facts: Facts) -> list[dict[str, Any]]:
    """Per domain, the worst first."""
    if facts.quality is None:
        return []
    domains = facts.quality["quality"]["domains"]
    ranked = sorted(domains.items(), key=lambda item: -item[1]["kl_nats"])
    top = max((found["kl_nats"] for _, found in ranked), default=0.0) or 1.0
    return [
        {
            "name": name,
            "share": max(found["kl_nats"], 0.0) / top,
            "kl": f"{found['kl_nats']:.4f}",
            "interval": f"{found['interval']['low']['kl_nats']:.4f} - "
            f"{found['interval']['high']['kl_nats']:.4f}"
            if found["interval"]
            else "",
            "perplexity": f"{found['perplexity_ratio']:.4f}",
            "agreement": words.percent(found["top1_agreement"]),
            "tokens": words.number(found["tokens"]),
        }
        for name, found in ranked
    ]


def alternatives(facts: Facts, t: Catalogue) -> list[dict[str, Any]]:
    """What was measured on the whole model, the best first."""
    rows = _measured(facts, t)
    top = max((kl["mean"] for _, kl, _ in rows), default=0.0) or 1.0
    return [
        {
            "name": name,
            "share": max(kl["mean"], 0.0) / top,
            "mean": f"{kl['mean']:.4f}",
            "worst": f"{kl['worst']:.4f}",
            "taken": taken,
        }
        for name, kl, taken in sorted(rows, key=lambda row: row[1]["mean"])
    ]


def _measured(facts: Facts, t: Catalogue) -> list[tuple[str, dict[str, float], bool]]:
    """(name, KL, whether it was taken)."""
    settings = facts.plan.settings
    weighed = settings.get("weighed")
    if isinstance(weighed, dict):
        taken = "mixture" if facts.plan.method == "auto" else facts.plan.method
        return [
            (t("mixture") if name == "mixture" else name, kl, name == taken)
            for name, kl in weighed["whole_model"].items()
        ]
    sizes = ("experts", "width", "top_k")
    return [
        (
            t("size", **{key: row[key] for key in sizes}),
            row["measured_kl"],
            all(row[key] == settings["size"].get(key) for key in sizes),
        )
        for row in weighed or ()
        if row["measured_kl"] is not None
    ]


def record(facts: Facts, t: Catalogue) -> list[tuple[str, str]]:
    """What proves where this came from."""
    manifest = facts.manifest
    return [
        (t("record_original"), manifest.original.name),
        (t("record_method"), manifest.method),
        (t("record_keep"), words.percent(facts.plan.keep)),
        (t("record_seed"), str(manifest.seed)),
        (t("record_plan"), manifest.plan_sha256),
        (t("record_statistics"), manifest.statistics_sha256 or t("record_none")),
    ]
