"""The whole offline run: calibrate, plan, apply, seal; resumable at every layer."""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from moe_serve.calibration.collect import Collection, collect, observe
from moe_serve.calibration.governance import refuse_purpose
from moe_serve.calibration.group import joined, own_device, started
from moe_serve.calibration.share import WHOLE, Share
from moe_serve.calibration.store import Statistics
from moe_serve.calibration.trace import KEPT_BYTES
from moe_serve.calibration.traffic import read_traffic
from moe_serve.checkpoint.formats import Form, form_named
from moe_serve.checkpoint.hashing import file_sha256
from moe_serve.checkpoint.layout import carry_over, write_config
from moe_serve.checkpoint.manifest import (
    ExpertBytes,
    LayerCounts,
    Manifest,
    Original,
    PredictionLayers,
)
from moe_serve.checkpoint.shards import ShardWriter
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.checkpoint.staging import Staging, free_bytes, require_space, staged
from moe_serve.errors import PlanError, UsageError
from moe_serve.files import write_atomic
from moe_serve.progress import SILENT, Progress
from moe_serve.pruning.apply import Application, apply_plan
from moe_serve.pruning.card import model_card
from moe_serve.pruning.evidence import Evidence
from moe_serve.pruning.methods import method_named
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.request import (
    CPU,
    DEFAULT_BATCH,
    WORST,
    Corpus,
    Selection,
    TextOptions,
    load_corpus,
)
from moe_serve.pruning.trial import Trial
from moe_serve.pruning.worst import Game, Round, best
from moe_serve.version import __version__

PLAN: Final = "plan.json"
_STATISTICS: Final = "statistics"
_STATES: Final = "keep-states"


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneRequest:
    """One offline run."""

    model: Path
    output: Path
    texts: TextOptions
    selection: Selection
    form: str = "compact"
    device: torch.device = CPU
    batch_tokens: int = DEFAULT_BATCH
    plan: Path | None = None
    """Carry out this plan instead of making one."""
    statistics: Path | None = None
    """Use these statistics, or keep the run's here when the folder does not exist."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneResult:
    """What ``prune --json`` prints."""

    output: Path
    manifest: Manifest
    statistics: Path | None
    seconds: dict[str, float]
    peak_rss_bytes: int

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
        given.check(checkpoint)
        if request.texts.task_weight is not None:
            raise UsageError(
                "is decided when planning", where="--task-weight", remedy="leave out it or --plan"
            )
    elif request.statistics is None or not request.statistics.exists():
        request.selection.resolve(checkpoint, texts=request.texts.given)
    corpus = load_corpus(checkpoint, request.texts)
    if given is not None and corpus is not None:
        corpus = corpus.weighed(given.balance)
    clock = _Clock()
    with staged(request.output, _fingerprint(request, checkpoint, corpus, given)) as staging:
        with clock("calibrate"):
            corpus, rounds = _balanced(request, checkpoint, corpus, given, staging, progress)
        statistics = _calibrated(request, checkpoint, corpus, given, staging, clock, progress)
        with clock("plan"):
            plan = given or _planned(
                request, checkpoint, statistics, corpus, rounds, staging, progress
            )
            plan.save(staging.path / PLAN)
            Evidence.of(checkpoint, statistics or _at_hand(request, checkpoint)).save(staging.path)
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
            record = _record(request, checkpoint, corpus, statistics)
            manifest = _seal(checkpoint, plan, form, record, refit, staging, progress)
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


def calibrate(
    model: Path,
    output: Path,
    texts: TextOptions,
    device: torch.device = CPU,
    batch_tokens: int = DEFAULT_BATCH,
    progress: Progress = SILENT,
    share: Share = WHOLE,
    *,
    balance: Mapping[str, float] | None = None,
    traffic: Sequence[Path] = (),
) -> Statistics:
    """Gather statistics into a folder; resumes an unfinished one.

    ``traffic`` are saved ``/metrics`` pages: experts count as often as production selected them.

    Under ``torchrun`` every process takes its part, and all see the same ``output``: hidden states
    of the others lie in folders beside it until the end.

    Raises:
        MoeServeError: the model, the texts or the output place can't be used.
    """
    checkpoint = open_checkpoint(model)
    corpus = load_corpus(checkpoint, texts)
    if corpus is None:
        raise UsageError("give texts to calibrate on", where="--calibration")
    if balance is not None:
        corpus = corpus.weighed(balance)
    record = corpus.record(checkpoint, texts.seed, share)
    if traffic:
        record = replace(record, traffic=read_traffic(traffic, checkpoint))
    device = own_device(device)
    with joined(device) as group:
        print_of = record.to_json() | {"shards": checkpoint.freshness(), "processes": group.size}
        place = output.with_name(f"{output.name}.rank-{group.rank}") if group.rank else output
        with staged(place, print_of) as staging:
            settings = Collection(device=device, batch_tokens=batch_tokens, group=group)
            observe(checkpoint, corpus.sequences, record, staging.path, staging, settings, progress)
        if group.rank:
            shutil.rmtree(place)
        group.all(mine=True)  # The first process has named its output.
    return Statistics(output)


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
        "heal": selection.heal,
        "across_layers": selection.across_layers,
        "merging": [selection.coefficients, selection.drop_when_better],
        "requantise": selection.requantise,
        "objective": selection.objective,
        "seed": selection.seed,
        "version": __version__,
    }


def _balanced(
    request: PruneRequest,
    checkpoint: Checkpoint,
    corpus: Corpus | None,
    given: Plan | None,
    staging: Staging,
    progress: Progress,
) -> tuple[Corpus | None, list[Round]]:
    """The texts as the objective weighs them, and how that was found; once per output."""
    if request.selection.objective != WORST or corpus is None or given is not None:
        return corpus, []
    game = Game(
        checkpoint=checkpoint,
        corpus=corpus,
        selection=request.selection,
        form=request.form,
        settings=Collection(device=request.device, batch_tokens=request.batch_tokens),
        staging=staging,
    )
    if request.statistics is not None and request.statistics.exists() and not game.begun:
        raise UsageError(
            "were gathered under other weights than those it chooses",
            where="--objective worst-domain, --statistics",
            remedy="name a folder that does not exist",
        )
    rounds = game.play(progress)
    return corpus.weighed(best(rounds).balance), rounds


def _calibrated(
    request: PruneRequest,
    checkpoint: Checkpoint,
    corpus: Corpus | None,
    given: Plan | None,
    staging: Staging,
    clock: _Clock,
    progress: Progress,
) -> Statistics | None:
    """Statistics from the folder given, or from the texts; none where a plan is given."""
    if given is not None:
        return None
    if request.statistics is not None and request.statistics.exists():
        found = Statistics(request.statistics)
        if corpus is not None and corpus.balance != found.balance:
            raise UsageError(
                f"weigh domains {found.balance or 'alike'}, the texts {corpus.balance or 'alike'}",
                where=str(request.statistics),
                remedy="give the task texts and weight that they were gathered with",
            )
        if request.texts.purpose:
            refuse_purpose(found.record["sources"], request.texts.purpose, request.statistics)
        return found
    if corpus is None:
        return None
    with clock("calibrate"):
        if request.statistics is not None:
            return calibrate(
                request.model,
                request.statistics,
                request.texts,
                request.device,
                request.batch_tokens,
                progress,
                balance=corpus.balance,
            )
        folder = staging.work / _STATISTICS
        folder.mkdir(exist_ok=True)
        return collect(
            checkpoint,
            corpus.sequences,
            replace(corpus.record(checkpoint, request.texts.seed), gradients=_feels_loss(request)),
            folder,
            staging,
            Collection(
                device=request.device,
                batch_tokens=request.batch_tokens,
                keep_states=_keeps_states(request, checkpoint, corpus, staging),
            ),
            progress,
        )


def _at_hand(request: PruneRequest, checkpoint: Checkpoint) -> Statistics | None:
    """Statistics that a plan was made from, where they are named beside it."""
    if request.statistics is None or not request.statistics.exists():
        return None
    found = Statistics(request.statistics)
    found.check(checkpoint)
    return found


def _keeps_states(
    request: PruneRequest, checkpoint: Checkpoint, corpus: Corpus, staging: Staging
) -> bool:
    """Whether the original's hidden states stay for a re-fit: where there is one, and room."""
    if (found := staging.done(_STATES)) is None:
        _, _, refit = request.selection.resolve(checkpoint, texts=True)
        shape, tokens = checkpoint.shape, corpus.sequences.total
        needed = (shape.layers + 1) * tokens * shape.hidden * 4
        room = min(KEPT_BYTES, free_bytes(staging.path) // 3)
        wanted = refit or request.selection.router_refit or request.selection.heal
        found = wanted and needed <= room
        staging.finish(_STATES, found)
    return bool(found)


def _feels_loss(request: PruneRequest) -> bool:
    """Whether the method asks for gradients; statistics that are kept serve any method."""
    return method_named(request.selection.method, texts=True).loss


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
            device=request.device,
            batch_tokens=request.batch_tokens,
            progress=progress,
        )
    plan = make_plan(
        checkpoint, statistics, request.selection, progress, form=request.form, trial=trial
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


def _record(
    request: PruneRequest,
    checkpoint: Checkpoint,
    corpus: Corpus | None,
    statistics: Statistics | None,
) -> dict[str, Any] | None:
    """All texts that had a part in it: those given, and those behind statistics made before."""
    own = corpus.record(checkpoint, request.texts.seed).to_json() if corpus else None
    at_hand = statistics or _at_hand(request, checkpoint)
    before = at_hand.record if at_hand else None
    # The model's path is this machine's; the original's name says enough.
    kept = [
        {k: v for k, v in r.items() if k not in ("model", "sha256")} for r in (own, before) if r
    ]
    if own and before and own["tokens_sha256"] != before["tokens_sha256"]:
        return kept[0] | {"statistics": kept[1]}
    return kept[0] if kept else None


def _seal(
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
    write_atomic(
        target / "README.md", model_card(manifest, served=checkpoint.family.served).encode()
    )
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
