"""The last files of an output: config, carried files, card, manifest."""

from __future__ import annotations

from typing import Any

from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.card import write_card
from moe_serve.checkpoint.form import Form
from moe_serve.checkpoint.hashing import file_sha256
from moe_serve.checkpoint.layout import carry_over, write_config
from moe_serve.checkpoint.manifest import (
    ExpertBytes,
    LayerCounts,
    Manifest,
    Original,
    PredictionLayers,
)
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.staging import Staging
from moe_serve.progress import Progress
from moe_serve.pruning.corpus import Corpus
from moe_serve.pruning.gathering import at_hand
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.request import PruneRequest
from moe_serve.version import __version__


def record_of(
    request: PruneRequest,
    checkpoint: Checkpoint,
    corpus: Corpus | None,
    statistics: Statistics | None,
) -> dict[str, Any] | None:
    """All texts that had a part in it: those given, and those behind statistics made before."""
    own = corpus.record(checkpoint, request.texts.seed).to_json() if corpus else None
    found = statistics or at_hand(request, checkpoint)
    before = found.record if found else None
    # The model's path is this machine's; the original's name says enough.
    kept = [
        {k: v for k, v in r.items() if k not in ("model", "sha256")} for r in (own, before) if r
    ]
    if own and before and own["tokens_sha256"] != before["tokens_sha256"]:
        return kept[0] | {"statistics": kept[1]}
    return kept[0] if kept else None


def seal(
    checkpoint: Checkpoint,
    plan: Plan,
    form: Form,
    record: dict[str, Any] | None,
    refit: dict[str, Any] | None,
    staging: Staging,
    progress: Progress,
) -> Manifest:
    """Config, carried files, card and manifest: the last files of an output."""
    target = staging.path
    write_config(target, form.config)
    form.write_extras(target)
    carry_over(checkpoint, target)
    original = checkpoint.expert_bytes()
    predicting = checkpoint.prediction_layers()
    kept = {
        spec.name: spec.size
        for run in form.runs()
        for spec in run
        if spec.name.startswith(tuple(map(checkpoint.family.expert_prefix, original)))
    }
    manifest = Manifest(
        moe_serve_version=__version__,
        format=form.name,
        original=Original(
            name=checkpoint.path.resolve().name,
            config_sha256=file_sha256(checkpoint.path / "config.json"),
            weights=_original_hashes(checkpoint, staging, progress),
        ),
        method=plan.method,
        settings=plan.settings,
        seed=plan.seed,
        plan_sha256=plan.sha256(),
        statistics_sha256=plan.statistics_sha256,
        calibration=record,
        refit=refit,
        expert_bytes=ExpertBytes(original=sum(original.values()), kept=sum(kept.values())),
        numbers=plan.numbers.model_dump(mode="json") if plan.numbers else None,
        layers={
            i: LayerCounts(
                width=p.width,
                blocks=len(p.blocks),
                dropped=len(p.table().dropped),
                replaced=len(p.replaced()),
            )
            for i, p in plan.layers.items()
        },
        prediction_layers=PredictionLayers(
            layers=tuple(predicting), bytes=sum(predicting.values()), kept=not plan.layers
        )
        if predicting
        else None,
    )
    write_card(target, manifest, served=checkpoint.family.served)
    return manifest.save(target, progress)


def _original_hashes(
    checkpoint: Checkpoint, staging: Staging, progress: Progress
) -> dict[str, str]:
    step = "hash-original"
    if (found := staging.done(step)) is not None:
        return dict(found)
    progress.start("hash original", len(checkpoint.shards))
    hashes = {}
    for shard in checkpoint.shards:
        hashes[shard.name] = file_sha256(shard)
        progress.advance()
    staging.finish(step, hashes)
    return hashes
