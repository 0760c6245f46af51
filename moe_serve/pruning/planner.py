"""From statistics to a plan, one layer at a time."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.formats import form_named
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.progress import Progress
from moe_serve.pruning.methods import Method
from moe_serve.pruning.plan import LayerPlan, Plan, Refit
from moe_serve.pruning.request import Selection
from moe_serve.pruning.view import Budget, LayerView


@torch.inference_mode()
def make_plan(
    checkpoint: Checkpoint,
    statistics: Statistics | None,
    selection: Selection,
    progress: Progress,
    *,
    form: str = "compact",
) -> Plan:
    """Decide what every layer keeps.

    A layer that would keep everything is left out of the plan and copied byte for byte.
    Peak memory: one layer's statistics and weights.

    Args:
        checkpoint: the original.
        statistics: of that checkpoint; ``None`` for methods that need none.
        selection: what was asked.
        progress: told about every layer.
        form: output format the plan must be expressible in.

    Raises:
        PlanError, UsageError: the request can't be met.
    """
    if statistics is not None:
        statistics.check(checkpoint)
    method, budget, refit = selection.resolve(checkpoint, texts=statistics is not None)
    layers = checkpoint.family.moe_layers(checkpoint.config)
    progress.start("plan", len(layers))
    planned: dict[int, LayerPlan] = {}
    for index in layers:
        if budget.keep < 1.0:
            view = LayerView(
                index=index,
                checkpoint=checkpoint,
                statistics=statistics.layer(index) if statistics is not None else None,
            )
            planned[index] = method.choose(view, budget)
        progress.advance()
    plan = Plan(
        model=checkpoint.path.resolve().name,
        fingerprint=checkpoint.fingerprint(),
        statistics_sha256=statistics.sha256 if statistics is not None else None,
        method=method.name,
        settings=_settings(method, budget),
        seed=selection.seed,
        keep=budget.keep,
        refit=Refit() if refit and planned else None,
        layers=planned,
    )
    plan.check(checkpoint)
    form_named(form, checkpoint, plan.table())  # Refuses what this format can't express.
    return plan


def _settings(method: Method, budget: Budget) -> dict[str, Any]:
    settings = asdict(budget)
    if not method.blocks:
        del settings["block_width"]
    return settings
