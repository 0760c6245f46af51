"""The whole offline run: calibrate, plan, apply, seal; resumable at every layer."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_serve.calibration.group import started
from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.form import Form
from moe_serve.checkpoint.formats import form_named
from moe_serve.checkpoint.manifest import (
    Manifest,
)
from moe_serve.checkpoint.shards import ShardWriter
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.checkpoint.staging import Staging, require_space, staged
from moe_serve.errors import PlanError, UsageError
from moe_serve.progress import SILENT, Progress
from moe_serve.pruning.corpus import Corpus, load_corpus
from moe_serve.pruning.fitting.application import Application, apply_plan
from moe_serve.pruning.gathering import at_hand, balanced, calibrated, hold_to
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.records.evidence import Evidence
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.sealing import record_of, seal
from moe_serve.pruning.selection import WORST
from moe_serve.pruning.trial import Trial
from moe_serve.pruning.worst import Round
from moe_serve.version import __version__

PLAN: Final = "plan.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneResult:
    """What ``prune --json`` prints."""

    output: Path
    """The finished checkpoint."""
    manifest: Manifest
    """Its ``moe_serve.json``."""
    statistics: Path | None
    """Those it rests on; ``None``: chosen from the weights alone."""
    seconds: dict[str, float]
    """Of each phase."""
    peak_rss_bytes: int
    """The process's largest resident memory."""

    def to_json(self) -> dict[str, Any]:
        """The contract's shape."""
        return {
            "output": str(self.output),
            "format": self.manifest.format,
            "expert_bytes": self.manifest.expert_bytes.model_dump(),
            "layers": {str(i): c.model_dump() for i, c in self.manifest.layers.items()},
            "plan": str(self.output / PLAN),
            "statistics": str(self.statistics) if self.statistics else None,
            "seconds": {name: round(s, 3) for name, s in self.seconds.items()},
            "peak_rss_bytes": self.peak_rss_bytes,
        }


class _Clock:
    """Seconds per phase of this process; a resumed run counts only its own."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("calibrate", "plan", "apply"), 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.seconds[phase] += time.monotonic() - begin


def prune(request: PruneRequest, progress: Progress = SILENT) -> PruneResult:
    """Prune a checkpoint; the output appears whole or not at all.

    Weights are read once to calibrate, once to re-fit and once to be copied and hashed.

    Raises:
        MoeServeError: the input, the options or the output place can't be used; an unfinished
            output stays and is resumed by the same call.
    """
    if started():
        raise UsageError(
            "runs in one process",
            where="prune",
            remedy="run torchrun on moe-serve calibrate, then prune with --statistics",
        )
    checkpoint = open_checkpoint(request.model)
    if checkpoint.is_pruned:
        raise UsageError(
            "is already pruned", where=str(request.model), remedy="prune the original instead"
        )
    given = Plan.load(request.plan) if request.plan else None
    if given is not None:
        given.check(checkpoint, str(request.plan))
        if request.texts.task_weight is not None:
            raise UsageError(
                "is decided when planning",
                where="--task-weight",
                remedy="leave out one of it and --plan",
            )
    elif request.statistics is None or not request.statistics.exists():
        request.selection.resolve(checkpoint, texts=request.texts.given)
    corpus = load_corpus(checkpoint, request.texts)
    if given is not None and corpus is not None:
        corpus = corpus.weighed(given.balance)
    clock = _Clock()
    with staged(request.output, _fingerprint(request, checkpoint, corpus, given)) as staging:
        with clock("calibrate"):
            corpus, rounds = balanced(request, checkpoint, corpus, given, staging, progress)
            statistics = calibrated(request, checkpoint, corpus, given, staging, progress)
            used = statistics or at_hand(request, checkpoint)
            hold_to(used, request, staging)
        with clock("plan"):
            plan = given or _planned(
                request, checkpoint, statistics, corpus, rounds, staging, progress
            )
            plan.save(staging.path / PLAN)
            Evidence.of(checkpoint, used).save(staging.path)
        if plan.needs_texts and corpus is None:
            raise UsageError(
                "this plan re-fits what is kept and needs calibration texts",
                where="--calibration",
                remedy="give the texts, or plan with --no-refit and --no-router-refit",
            )
        _refuse_lost_constants(plan, request.form)
        with clock("apply"):
            form = form_named(request.form, checkpoint, plan.table(), plan.top_k)
            refit = _applied(request, checkpoint, plan, form, corpus, staging, progress)
            record = record_of(request, checkpoint, corpus, statistics)
            manifest = seal(checkpoint, plan, form, record, refit, staging, progress)
    return PruneResult(
        output=request.output,
        manifest=manifest,
        statistics=request.statistics,
        seconds=clock.seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _refuse_lost_constants(plan: Plan, form: str) -> None:
    """A plan that leans on constants makes another model in a format without them."""
    if form != "substitution" and any(layer.constants for layer in plan.layers.values()):
        raise PlanError(
            "this plan replaces experts by constants",
            where=f"--format {form}",
            remedy="give --format substitution",
        )


def _fingerprint(
    request: PruneRequest, checkpoint: Checkpoint, corpus: Corpus | None, given: Plan | None
) -> dict[str, Any]:
    """Everything that decides the output's bytes; an unfinished output must agree on all."""
    selection = request.selection
    return {
        "model": checkpoint.fingerprint(),
        "shards": checkpoint.freshness(),
        "texts": corpus.sequences.sha256() if corpus else None,
        "sources": [source.to_json() for source in corpus.sources] if corpus else None,
        "purpose": request.texts.purpose,
        "balance": list(corpus.sequences.balance) if corpus else None,
        "plan": given.sha256() if given else None,
        "format": request.form,
        "method": selection.method,
        "keep": selection.keep,
        "experts": selection.experts,
        "memory": [selection.memory, selection.kv_tokens, selection.gpu_count],
        "block_width": selection.block_width,
        "refit": selection.refit,
        "router_refit": selection.router_refit,
        "heal": selection.training.model_dump() if selection.training else None,
        "across_layers": selection.across_layers,
        "merging": [selection.coefficients, selection.drop_when_better],
        "requantise": selection.requantise,
        "objective": selection.objective,
        "seed": selection.seed,
        "version": __version__,
    }


def _planned(
    request: PruneRequest,
    checkpoint: Checkpoint,
    statistics: Statistics | None,
    corpus: Corpus | None,
    rounds: list[Round],
    staging: Staging,
    progress: Progress,
) -> Plan:
    """The plan, made once per output."""
    if staging.done("plan") is not None:
        return Plan.load(staging.path / PLAN)
    trial = None
    if corpus is not None:
        trial = Trial(
            checkpoint=checkpoint,
            sequences=corpus.sequences,
            folder=staging.work,
            staging=staging,
            device=request.device,
            batch_tokens=request.batch_tokens,
            progress=progress,
        )
    plan = make_plan(
        checkpoint,
        statistics,
        request.selection,
        progress,
        form=request.form,
        trial=trial,
        device=request.device,
    )
    if rounds:
        weighed = {"objective": WORST, "rounds": [r.to_json() for r in rounds]}
        plan = plan.model_copy(update={"settings": plan.settings | weighed})
    plan.save(staging.path / PLAN)
    staging.finish("plan")
    return plan


def _applied(
    request: PruneRequest,
    checkpoint: Checkpoint,
    plan: Plan,
    form: Form,
    corpus: Corpus | None,
    staging: Staging,
    progress: Progress,
) -> dict[str, Any] | None:
    layout = form.runs()
    if staging.done("apply/copy") is None:
        require_space(staging.path, sum(spec.size for run in layout for spec in run))
    writer = ShardWriter(staging.path, layout)
    app = Application(
        checkpoint=checkpoint,
        form=form,
        writer=writer,
        staging=staging,
        device=request.device,
        batch_tokens=request.batch_tokens,
        progress=progress,
    )
    refit = apply_plan(app, plan, corpus.sequences if corpus else None)
    writer.write_index()
    return refit
