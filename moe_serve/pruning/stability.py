"""When more calibration texts would hardly change the plan.

The plan made from fewer tokens and the one made from more are both judged by the newer statistics:
the squared output error, in the loss's metric, that removing their neurons adds under re-fitting
(what ``block-obs`` minimises, :mod:`moe_serve.pruning.methods.obs`). Neurons that are equally
dispensable change places from one calibration to the next for ever; what that costs goes to
nothing, about as one over the number of tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from moe_serve.calibration.store import RECORD, TENSORS, Statistics
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.checkpoint.staging import staged
from moe_serve.errors import UsageError
from moe_serve.progress import SILENT
from moe_serve.pruning.corpus import TextOptions, load_corpus, needed
from moe_serve.pruning.device import CPU
from moe_serve.pruning.methods.neurons import loss_root
from moe_serve.pruning.methods.obs import damped_inverse
from moe_serve.pruning.methods.view import LayerView
from moe_serve.pruning.plan import LayerPlan, Plan
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.selection import Selection

TOLERANCE: Final = 0.05
"""Larger an error, at most, for a plan not to have changed."""
FIRST: Final = 16
"""The first calibration takes this part of the tokens; each further one twice as many."""
_RULE: Final = "block-obs"
_RIDGE: Final = 0.01
"""As the removal path takes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """One of the calibrations, and what its plan showed."""

    tokens: int
    """Taken of each domain, at most."""
    observed: int
    """In all domains."""
    regret: float | None
    """Of the plan before it; ``None`` for the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stable:
    """How a calibration came to its end."""

    statistics: Statistics
    steps: tuple[Calibrated, ...]
    tolerance: float
    allowed: int
    """Tokens of each domain that it might have taken."""

    @property
    def settled(self) -> bool:
        """Whether the last two plans were alike enough; else the tokens ran out."""
        last = self.steps[-1].regret
        return last is not None and last <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """As ``calibrate --json`` prints it."""
        return {
            "settled": self.settled,
            "tolerance": self.tolerance,
            "tokens": self.steps[-1].tokens,
            "allowed": self.allowed,
            "steps": [
                {"tokens": step.tokens, "observed": step.observed, "regret": step.regret}
                for step in self.steps
            ],
        }


def calibrate_until_stable(
    model: Path,
    output: Path,
    texts: TextOptions,
    keep: float,
    tolerance: float,
    gather: Callable[[Path, TextOptions], Statistics],
    device: torch.device = CPU,
) -> Stable:
    """Calibrate on twice as many tokens each time, until the plan no longer changes.

    What comes out is what a calibration on the last number of tokens alone makes, byte for byte.
    The ones before it cost as many tokens again, together. A killed run goes on where it was.

    Args:
        model: the original.
        output: folder to make.
        texts: what to observe; its ``tokens`` are the most that may be taken of each domain.
        keep: share of the expert bytes that the plans keep.
        tolerance: see :func:`regret`.
        gather: calibrates into a folder, resuming an unfinished one.
        device: where plans are made.

    Raises:
        UsageError: a bound is out of range, or there are no texts.
        MoeServeError: as the calibration and the plan.
    """
    if not 0 < keep < 1 or not 0 < tolerance < 1:
        raise UsageError(
            "must lie between 0 and 1", where="--until-stable, --tolerance", remedy="give 0.05, say"
        )
    checkpoint = open_checkpoint(model)
    corpus = needed(load_corpus(checkpoint, texts))
    selection = Selection(method=_RULE, keep=keep)
    fingerprint = corpus.record(checkpoint, texts.seed).to_json() | {
        "shards": checkpoint.freshness(),
        "until_stable": [keep, tolerance],
    }
    steps: list[Calibrated] = []
    older: Plan | None = None
    count = max(1, -(-texts.tokens // FIRST))
    with staged(output, fingerprint) as staging:
        while True:
            key = f"tokens-{count}"
            folder, kept = staging.work / key, staging.work / f"{key}.plan.json"
            if (row := staging.done(key)) is None:
                done = (folder / RECORD).exists()
                found = Statistics(folder) if done else gather(folder, replace(texts, tokens=count))
                newer = make_plan(checkpoint, found, selection, SILENT, device=device)
                newer.save(kept)
                changed = None if older is None else regret(checkpoint, found, older, newer)
                row = {"observed": sum(found.record["tokens"].values()), "regret": changed}
                staging.finish(key, row)
            steps.append(Calibrated(tokens=count, **row))
            changed = steps[-1].regret
            if count >= texts.tokens or (changed is not None and changed <= tolerance):
                break
            # Its plan is all that the next step asks for; statistics of large models fill disks.
            shutil.rmtree(folder, ignore_errors=True)
            older, count = Plan.load(kept), min(2 * count, texts.tokens)
        for name in (TENSORS, RECORD):
            (folder / name).replace(staging.path / name)
    return Stable(
        statistics=Statistics(output),
        steps=tuple(steps),
        tolerance=tolerance,
        allowed=texts.tokens,
    )


def regret(checkpoint: Checkpoint, statistics: Statistics, older: Plan, newer: Plan) -> float:
    """By what share the older plan's error is larger than the newer one's, by these statistics.

    Args:
        checkpoint: the original.
        statistics: that the newer plan was made from.
        older: made from fewer tokens, with the same budget.
        newer: both keep neurons of original experts, unmerged.

    Memory: one layer's normal matrices, and three of one expert.
    """
    before, after = errors(checkpoint, statistics, (older, newer))
    return before / after - 1.0 if after else 0.0


@torch.inference_mode()
def errors(checkpoint: Checkpoint, statistics: Statistics, plans: Sequence[Plan]) -> list[float]:
    """What each plan's removals add to the output error of all layers, by some statistics."""
    totals = [0.0 for _ in plans]
    for index in checkpoint.family.moe_layers(checkpoint.config):
        view = LayerView.of(checkpoint, statistics, index)
        for side, error in enumerate(_errors(view, [plan.layers.get(index) for plan in plans])):
            totals[side] += error
    return totals


def _errors(view: LayerView, plans: list[LayerPlan | None]) -> list[float]:
    """Each plan's error in one layer."""
    observed = view.observed()
    normal_NII = observed.normal_NII / observed.weight
    root_DD = loss_root(view.gradients())
    down_NDI = torch.einsum("de,ndi->nei", root_DD, view.projection(2))
    kept = [_kept(plan) for plan in plans]
    totals = [0.0 for _ in plans]
    for expert in range(view.shape.experts):
        inverse_II = damped_inverse(normal_NII, expert, _RIDGE)
        weight_ID = down_NDI[expert].T.to(inverse_II.dtype)
        for side, neurons in enumerate(kept):
            if neurons is not None:
                totals[side] += _removed(inverse_II, weight_ID, neurons.get(expert, set()))
    return totals


def _kept(plan: LayerPlan | None) -> dict[int, set[int]] | None:
    """Expert → its neurons that stay; ``None``: all of all."""
    if plan is None:
        return None
    found: dict[int, set[int]] = {}
    for block in plan.blocks:
        for part in block.parts:
            found.setdefault(part.expert, set()).update(part.neurons)
    return found


def _removed(inverse_II: torch.Tensor, weight_ID: torch.Tensor, kept: set[int]) -> float:
    """tr(W_Sᵀ ((H⁻¹)_SS)⁻¹ W_S), S all neurons but those."""
    gone = [neuron for neuron in range(len(inverse_II)) if neuron not in kept]
    if not gone:
        return 0.0
    lost_SD = weight_ID[gone]
    factor_SS = torch.linalg.cholesky(inverse_II[gone][:, gone])
    return float((lost_SD * torch.cholesky_solve(lost_SD, factor_SS)).sum())
