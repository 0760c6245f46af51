"""The forecast of a run as requested, on this machine; writes nothing that stays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import psutil

from moe_serve.calibration.gradients import GRADIENT_TOKENS
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.checkpoint.staging import free_bytes
from moe_serve.families import Shape
from moe_serve.pruning import auto
from moe_serve.pruning.corpus import Corpus, load_corpus, needed
from moe_serve.pruning.forecasts.forecast import Forecast, Rates, Step
from moe_serve.pruning.forecasts.healing import drafts_step, healed_step
from moe_serve.pruning.forecasts.probe import measure
from moe_serve.pruning.forecasts.steps import apply_step, calibrate_step, plan_step, trial_step
from moe_serve.pruning.forecasts.work import Sizes, Work
from moe_serve.pruning.methods.neurons import block_obs
from moe_serve.pruning.methods.registry import AUTO, METHODS, Method, gradient_tokens
from moe_serve.pruning.native import SHORTLIST
from moe_serve.pruning.plan import Plan, Refit
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.selection import WORST
from moe_serve.pruning.worst import ROUNDS, TOKENS


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """A forecast and what it is measured against."""

    forecast: Forecast
    rates: Rates
    free_memory: int
    free_disk: int

    @property
    def problems(self) -> list[str]:
        """What this machine lacks."""
        found = []
        if self.forecast.memory > self.free_memory:
            found.append(
                f"needs {self.forecast.memory / 1e9:.1f} GB of memory, "
                f"{self.free_memory / 1e9:.1f} GB are free; lower --batch-tokens, or use a larger "
                "machine"
            )
        if self.forecast.disk > self.free_disk:
            found.append(
                f"needs {self.forecast.disk / 1e9:.1f} GB on disk, "
                f"{self.free_disk / 1e9:.1f} GB are free; free some space or choose another output"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """For ``--dry-run --json``."""
        return self.forecast.to_json(self.rates) | {
            "free_memory_bytes": self.free_memory,
            "free_disk_bytes": self.free_disk,
            "problems": self.problems,
        }


def dry_run(request: PruneRequest, *, only_calibrate: bool = False) -> DryRun:
    """Resolve a request, add up its steps, measure this machine for about a second.

    Raises:
        MoeServeError: as the run itself would, before its work begins.
    """
    checkpoint = open_checkpoint(request.model)
    corpus = load_corpus(checkpoint, request.texts)
    forecast = (
        _calibration(request, checkpoint, corpus)
        if only_calibrate
        else _whole(request, checkpoint, corpus)
    )
    return DryRun(
        forecast=forecast,
        rates=measure(checkpoint, request.output, request.device, request.batch_tokens),
        free_memory=psutil.virtual_memory().available + forecast.base_memory,
        free_disk=free_bytes(request.output),
    )


def _calibration(request: PruneRequest, checkpoint: Checkpoint, corpus: Corpus | None) -> Forecast:
    step = calibrate_step(Sizes.of(checkpoint), _work(request, needed(corpus), keep=1.0))
    return Forecast(steps=(step,), output_bytes=0, base_memory=_resident())


def _whole(request: PruneRequest, checkpoint: Checkpoint, corpus: Corpus | None) -> Forecast:
    sizes, steps = Sizes.of(checkpoint), []
    if request.plan is not None:
        plan = Plan.load(request.plan)
        plan.check(checkpoint, str(request.plan))
        work = replace(_work(request, corpus, keep=plan.keep, refit=plan.refit), heal=plan.heal)
    else:
        given = request.statistics is not None and request.statistics.exists()
        texts = corpus is not None or given
        method, budget, refits = request.selection.resolve(checkpoint, texts=texts)
        refit = Refit() if refits or budget.constants else None  # Both stream the texts again.
        work = replace(
            _work(request, corpus, keep=budget.keep, refit=refit),
            reverse=(
                gradient_tokens(method.name, sizes.shape.hidden)
                if request.statistics is None and texts
                else GRADIENT_TOKENS
            ),
            inverts=method.neurons is block_obs,
            compares=int(method.compares),
            alignments=_alignments(method, sizes.shape),
            heal=request.selection.training,
            keeps=request.statistics is None and not request.selection.heal,
        )
        if corpus is not None and not given:
            if request.selection.objective == WORST:
                steps += _rounds(sizes, replace(work, tokens=min(work.tokens, TOKENS)))
            steps.append(calibrate_step(sizes, work))
        steps.append(plan_step(sizes, work))
        if corpus is not None:
            work = _with_trials(work, request, sizes.shape)
        if work.trials:
            steps.append(trial_step(sizes, work))
    if work.heal is None:
        applied = apply_step(sizes, work)
    else:
        steps.append(drafts_step(sizes, work, work.heal))
        applied = healed_step(sizes, work, work.heal)
    return Forecast(steps=(*steps, applied), output_bytes=applied.written, base_memory=_resident())


def _rounds(sizes: Sizes, work: Work) -> list[Step]:
    """What finding a balance over domains takes before anything else."""
    once = (calibrate_step(sizes, work), plan_step(sizes, work), apply_step(sizes, work))
    return [
        replace(
            step,
            name=f"balance domains: {step.name}",
            passes=ROUNDS * step.passes,
            flops=ROUNDS * step.flops,
            read=ROUNDS * step.read,
            written=0 if step is once[2] else ROUNDS * step.written,
        )
        for step in once
    ]


def _work(
    request: PruneRequest,
    corpus: Corpus | None,
    *,
    keep: float,
    refit: Refit | None = None,
) -> Work:
    sequences = corpus.sequences if corpus else None
    return Work(
        tokens=sequences.total if sequences else 0,
        domains=len(sequences.domains) if sequences else 0,
        length=max(map(len, sequences.tokens)) if sequences else 0,
        batch_tokens=request.batch_tokens,
        keep=keep,
        refit=refit if sequences else None,
    )


def _with_trials(work: Work, request: PruneRequest, shape: Shape) -> Work:
    """The work with the walks by which choices are measured, and their fits.

    As it is where a leader wins in every layer and rules for whole experts are far behind; a
    mixture takes a walk more, a rival that is not so far a fit.
    """
    trials = 2 if request.selection.router_refit else 0
    if request.selection.uniform:
        trials += SHORTLIST
    elif request.selection.method == AUTO:
        trials += len(auto.LEADERS)
        others, rivals = len(auto.LEADERS) - 1, auto.rivals(shape)
        methods = [METHODS[name] for name in rivals]
        work = replace(
            work,
            screened=others,
            glanced=len(rivals),
            compares=sum(method.compares for method in methods),
            alignments=sum(_alignments(method, shape) for method in methods),
        )
    return replace(work, trials=trials, attempts=trials)


def _alignments(method: Method, shape: Shape) -> int:
    """Neuron assignments in a layer, at most."""
    if method.pairs:
        return shape.experts * (shape.experts - 1) // 2
    return shape.experts if method.merges else 0


def _resident() -> int:
    """What interpreter and libraries take already."""
    size: int = psutil.Process().memory_info().rss
    return size
