"""The page: facts and figures, in words of one language, as a single HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from moe_serve.calibration.store import Statistics
from moe_serve.errors import CheckpointError
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.records.evidence import Evidence
from moe_serve.report import figures, words
from moe_serve.report.catalogue import Catalogue
from moe_serve.report.facts import STATES, Expert, Facts, Layer, standing_out
from moe_serve.report.summary import alternatives, done, quality, record, risks, tiles
from moe_serve.report.templating import templates

_MANY: Final = 512
"""More experts than this, and a layer's part of the page is built when it is opened."""
_LABELLED: Final = 32
"""Matrices of more experts are drawn without labels, and their table holds the nearest only."""
_NEAREST: Final = 5


def report(
    folder: Path,
    *,
    language: str,
    statistics: Path | None = None,
    quality_file: Path | None = None,
    run_file: Path | None = None,
) -> str:
    """Write the page of a pruned checkpoint.

    Args:
        folder: the checkpoint, in any format.
        language: ``en`` or ``ja``.
        statistics: of its original, where the checkpoint was written without them.
        quality_file: what ``compare --json`` printed.
        run_file: what ``prune --json`` printed.

    Raises:
        MoeServeError: a file is missing, damaged or of another run.
    """
    evidence = Evidence.load(folder)
    if statistics is not None:
        evidence = _observed(evidence, Statistics(statistics), folder)
    facts = Facts.read(folder, evidence=evidence, quality=quality_file, run=run_file)
    return render(facts, Catalogue.of(language))


def _observed(evidence: Evidence, statistics: Statistics, folder: Path) -> Evidence:
    if statistics.record["fingerprint"] != Plan.load(folder / "plan.json").fingerprint:
        raise CheckpointError(
            "were gathered on another model than this checkpoint's original",
            where=str(statistics.folder),
            remedy="give the statistics that its plan was made from",
        )
    return evidence.observed(statistics)


def render(facts: Facts, t: Catalogue) -> str:
    """The page as HTML; whatever comes from files is escaped."""
    environment = templates(t, number=words.number, short=words.short)
    present = {e.state for e in facts.experts}
    return environment.get_template("report.html").render(
        facts=facts,
        name=facts.manifest.original.name,
        states=[state for state in STATES if state in present],
        domains=facts.evidence.domains,
        done=done(facts, t),
        tiles=tiles(facts, t),
        risks=risks(facts, t),
        quality=quality(facts),
        alternatives=alternatives(facts, t),
        sensitivities=figures.sensitivities(facts.layers),
        ranked=any(layer.removed_G for layer in facts.layers),
        layers=[_layer_view(layer, facts, t) for layer in facts.layers],
        lazy=len(facts.experts) > _MANY,
        index=[[e.layer, e.index, e.state, e.domains, e.starved] for e in facts.experts],
        record=record(facts, t),
        sources=facts.manifest.sources(),
        tokens=(facts.manifest.calibration or {}).get("tokens", {}),
    )


def _layer_view(layer: Layer, facts: Facts, t: Catalogue) -> dict[str, Any]:
    drawn = figures.tree(layer)
    bars = 24 if len(facts.experts) <= _MANY else 8
    together = figures.groups(layer, drawn)
    counts = layer.counts()
    return {
        "layer": layer,
        "share": words.percent(layer.share),
        "headline": t(
            "headline",
            share=words.percent(layer.share),
            counts=t("join_list").join(
                f"{t('state_' + s)} {counts[s]}" for s in STATES if counts[s]
            ),
        ),
        "cards": [
            _card(expert, strip, t)
            for expert, strip in zip(layer.experts, figures.strips(layer, bars), strict=True)
        ],
        "map": _map(layer, drawn) if drawn else None,
        "merged": any(e.mates for e in layer.experts),
        "groups": [_group(layer, members, facts, t) for members in together],
        "routing": _routing(layer, facts),
        "alternatives": [
            {
                "name": name,
                "errors": [words.short(error) for error in errors],
                "taken": name == layer.taken,
            }
            for name, errors in sorted(layer.alternatives.items(), key=_behind)
        ],
        "far": any(after is None for _, after in layer.alternatives.values()),
    }


def _behind(item: tuple[str, tuple[float, float | None]]) -> tuple[bool, float]:
    """What was compensated comes first, by what it lacks then."""
    bare, error = item[1]
    return error is None, bare if error is None else error


def _card(expert: Expert, strip: figures.Strip, t: Catalogue) -> dict[str, Any]:
    rows = [(t("neurons_kept"), f"{words.number(expert.kept)} / {words.number(expert.width)}")]
    if expert.cost is not None and expert.worth:
        lost = words.percent(expert.cost / expert.worth)
        rows.append((t("why"), t("why_trimmed", share=lost)))
        rows += [(t("cost"), words.short(expert.cost)), (t("worth"), words.short(expert.worth))]
    if expert.mates:
        rows.append((t("mates"), ", ".join(f"E{e}" for e in expert.mates)))
    if expert.tokens is not None:
        rows.append((t("tokens"), words.number(expert.tokens)))
    rows += [
        (t("served", domain=name), f"{expert.lift[name]:.2f} ×")
        for name in sorted(expert.lift, key=lambda name: -expert.lift[name])[:3]
    ]
    rows += [(t("score", name=name), words.short(s)) for name, s in expert.scores.items()]
    return {
        "expert": expert,
        "strip": strip,
        "share": words.percent(expert.share),
        "name": _named(expert.lift, t),
        "facts": rows,
    }


def _named(lift: Mapping[str, float], t: Catalogue) -> str:
    if not lift:
        return t("no_evidence")
    return ", ".join(standing_out(dict(lift))) or t("general")


def _map(layer: Layer, drawn: figures.Tree) -> dict[str, Any]:
    matrix_NN = layer.similarity_NN
    if matrix_NN is None:
        raise ValueError("a tree without the matrix it was drawn from")
    count = len(matrix_NN)
    others = matrix_NN[~np.eye(count, dtype=bool)]
    low, high = float(others.min()), float(others.max())
    if layer.measure == "distance":
        low, high = high, low
    few = count <= _LABELLED
    nearness_NN = -matrix_NN if layer.measure == "distance" else matrix_NN
    return {
        "size": count,
        "tree": drawn.path,
        "png": figures.heat(matrix_NN[np.ix_(drawn.order, drawn.order)], low=low, high=high),
        "labels": drawn.order if few else (),
        "low": f"{low:.2f}",
        "high": f"{high:.2f}",
        "rows": [(e, [f"{matrix_NN[e, o]:.2f}" for o in drawn.order]) for e in drawn.order]
        if few
        else (),
        "nearest": [
            (e, ", ".join(f"E{o} {matrix_NN[e, o]:.2f}" for o in _near(nearness_NN[e], e)))
            for e in range(count)
        ]
        if not few
        else (),
    }


def _near(nearness_N: figures.Floats, expert: int) -> list[int]:
    ranked = np.argsort(-nearness_N, kind="stable")
    return [int(e) for e in ranked if e != expert][:_NEAREST]


def _group(layer: Layer, members: tuple[int, ...], facts: Facts, t: Catalogue) -> dict[str, Any]:
    experts = [layer.experts[e] for e in members]
    mean = {
        name: sum(e.lift.get(name, 0.0) for e in experts) / len(experts)
        for name in facts.evidence.domains
    }
    alike = figures.likeness(layer, members)
    return {
        "name": _named(mean, t),
        "members": ", ".join(f"E{e}" for e in members),
        "likeness": "" if alike is None else f"{alike:.2f}",
    }


def _routing(layer: Layer, facts: Facts) -> str | None:
    seen = facts.evidence.layers.get(layer.index)
    if seen is None:
        return None
    tokens_C1 = np.array([[facts.evidence.tokens[name]] for name in facts.evidence.domains])
    rate_CN = np.array(seen.tokens_CN, dtype=np.float64) / np.maximum(tokens_C1, 1)
    return figures.heat(rate_CN, low=0.0, high=float(rate_CN.max()))
