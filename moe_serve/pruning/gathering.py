"""Statistics for a run: gathered from its texts, or taken from a folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from moe_serve.calibration.collect import Collection, collect, observe
from moe_serve.calibration.governance import refuse_purpose
from moe_serve.calibration.gradients import GRADIENT_TOKENS
from moe_serve.calibration.group import joined, own_device
from moe_serve.calibration.share import WHOLE, Share
from moe_serve.calibration.store import Statistics
from moe_serve.calibration.trace import KEPT_BYTES
from moe_serve.calibration.traffic import read_traffic
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.checkpoint.staging import Staging, free_bytes, staged
from moe_serve.errors import OutputError, UsageError
from moe_serve.progress import SILENT, Progress
from moe_serve.pruning.corpus import (
    Corpus,
    TextOptions,
    load_corpus,
    needed,
)
from moe_serve.pruning.device import CPU
from moe_serve.pruning.methods.registry import gradient_tokens
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.request import DEFAULT_BATCH, PruneRequest
from moe_serve.pruning.selection import WORST
from moe_serve.pruning.worst import Game, Round, best

_STATISTICS: Final = "statistics"


_STATES: Final = "keep-states"
_USED: Final = "statistics-used"


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
    gradients: int = GRADIENT_TOKENS,
) -> Statistics:
    """Gather statistics into a folder; resumes an unfinished one.

    ``traffic`` are saved ``/metrics`` pages: experts count as often as production selected them.
    ``gradients`` are tokens of which the reverse pass is taken at most.

    Under ``torchrun`` every process takes its part, and all see the same ``output``: hidden states
    of the others lie in folders beside it until the end.

    Raises:
        MoeServeError: the model, the texts or the output place can't be used.
    """
    checkpoint = open_checkpoint(model)
    corpus = needed(load_corpus(checkpoint, texts))
    if balance is not None:
        corpus = corpus.weighed(balance)
    record = replace(corpus.record(checkpoint, texts.seed, share), gradients=gradients)
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


def balanced(
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


def calibrated(
    request: PruneRequest,
    checkpoint: Checkpoint,
    corpus: Corpus | None,
    given: Plan | None,
    staging: Staging,
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
        replace(
            corpus.record(checkpoint, request.texts.seed),
            gradients=_gradient_tokens(request, checkpoint),
        ),
        folder,
        staging,
        Collection(
            device=request.device,
            batch_tokens=request.batch_tokens,
            keep_states=_keeps_states(request, checkpoint, corpus, staging),
        ),
        progress,
    )


def at_hand(request: PruneRequest, checkpoint: Checkpoint) -> Statistics | None:
    """Statistics that a plan was made from, where they are named beside it."""
    if request.statistics is None or not request.statistics.exists():
        return None
    found = Statistics(request.statistics)
    found.check(checkpoint)
    return found


def hold_to(used: Statistics | None, request: PruneRequest, staging: Staging) -> None:
    """Record what an output rests on; only it can go on with what it was begun with.

    Raises:
        OutputError: an unfinished run began with other statistics, or with none.
    """
    now = {
        "sha256": used.sha256 if used else None,
        "weights": used.weights_sha256 if used else None,
    }
    before = staging.done(_USED)
    if before is None:
        staging.finish(_USED, now)
    elif before != now:
        theirs = f"those with SHA-256 {before['sha256']}" if before["sha256"] else "none"
        raise OutputError(
            f"an unfinished run at {staging.path} rests on other statistics: {theirs}",
            where=f"--statistics {request.statistics}" if request.statistics else "--statistics",
            remedy="repeat that run's command to finish it, or delete its folder",
        )


def _keeps_states(
    request: PruneRequest, checkpoint: Checkpoint, corpus: Corpus, staging: Staging
) -> bool:
    """Whether the original's hidden states stay for a re-fit: where there is one, and room."""
    if (found := staging.done(_STATES)) is None:
        _, _, refit = request.selection.resolve(checkpoint, texts=True)
        shape, tokens = checkpoint.shape, corpus.sequences.total
        needed = (shape.layers + 1) * tokens * shape.hidden * 4
        room = min(KEPT_BYTES, free_bytes(staging.path) // 3)
        # Healing walks over drafts as well, whose states are not among them.
        wanted = (refit or request.selection.router_refit) and not request.selection.heal
        found = wanted and needed <= room
        staging.finish(_STATES, found)
    return bool(found)


def _gradient_tokens(request: PruneRequest, checkpoint: Checkpoint) -> int:
    """Those that the method asks for; statistics that are kept serve any method."""
    return gradient_tokens(request.selection.method, checkpoint.shape.hidden)
