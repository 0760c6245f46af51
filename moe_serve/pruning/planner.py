"""From statistics to a plan, one layer at a time."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.formats import form_named
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.errors import PlanError
from moe_serve.families import Shape
from moe_serve.progress import Progress
from moe_serve.pruning.allocation import distribute
from moe_serve.pruning.grouping import counts_over_layers
from moe_serve.pruning.methods import Method
from moe_serve.pruning.native import choose, weigh
from moe_serve.pruning.neurons import Ladder, even_counts
from moe_serve.pruning.numbers import number_format
from moe_serve.pruning.plan import LayerPlan, Plan, Refit, RouterFit
from moe_serve.pruning.request import Selection
from moe_serve.pruning.split import one_row_each
from moe_serve.pruning.trial import Trial
from moe_serve.pruning.view import Budget, LayerView


@torch.inference_mode()
def make_plan(
    checkpoint: Checkpoint,
    statistics: Statistics | None,
    selection: Selection,
    progress: Progress,
    *,
    form: str = "compact",
    trial: Trial | None = None,
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
        trial: where choices that estimates leave open are measured; without texts they are not.

    Raises:
        PlanError, UsageError: the request can't be met.
    """
    if statistics is not None:
        statistics.check(checkpoint)
    shape = checkpoint.shape
    method, budget, refit = selection.resolve(checkpoint, texts=statistics is not None)
    layers = checkpoint.family.moe_layers(checkpoint.config) if budget.keep < 1.0 else ()
    passes = 2 if method.worth is not None and budget.across_layers else 1
    progress.start("plan", passes * len(layers))
    views = (_view(checkpoint, statistics, index, budget.tile, progress) for index in layers)
    weighed: dict[str, Any] = {}
    by = Refit() if refit else None
    if budget.uniform and method.neurons is not None and method.comparable and layers:
        planned, weighed = choose(
            weigh(views, method.neurons, budget.keep),
            (lambda layers: trial.measure(layers, by)) if trial is not None else None,
        )
    elif method.neurons is not None:
        planned = _spend(
            {view.index: method.neurons(view) for view in views}, method, budget, shape
        )
    elif method.experts is not None:
        budgets = dict.fromkeys(layers, budget)
        if method.worth is not None and budget.across_layers and not budget.uniform:
            worth = {view.index: method.worth(view) for view in views}
            budgets = _over_layers(worth, budget, shape)
            views = (
                _view(checkpoint, statistics, index, budget.tile, progress) for index in layers
            )
        planned = {view.index: method.experts(view, budgets[view.index]) for view in views}
        if budget.uniform and method.merges:
            planned = one_row_each(checkpoint, planned)
        if budget.constants:
            planned = {index: layer.with_constants() for index, layer in planned.items()}
    router = RouterFit() if selection.router_refit and planned else None
    if router is not None and trial is not None:
        fits = {
            name: trial.measure(planned, by, r) for name, r in (("without", None), ("with", router))
        }
        weighed |= {"router_refit": {name: kl._asdict() for name, kl in fits.items()}}
        if fits["with"].mean >= fits["without"].mean:
            router = None
    plan = Plan(
        model=checkpoint.path.resolve().name,
        fingerprint=checkpoint.fingerprint(),
        statistics_sha256=statistics.sha256 if statistics is not None else None,
        method=method.name,
        settings=_settings(method, budget) | weighed,
        seed=selection.seed,
        keep=budget.keep,
        refit=by if planned else None,
        router=router,
        balance=statistics.balance if statistics is not None else None,
        layers=planned,
        numbers=number_format(checkpoint, planned, refit=refit),
    )
    plan.check(checkpoint)
    # Refuses what this format can't express.
    form_named(form, checkpoint, plan.table(), plan.top_k)
    return plan


def _view(
    checkpoint: Checkpoint,
    statistics: Statistics | None,
    index: int,
    tile: int,
    progress: Progress,
) -> LayerView:
    progress.advance()
    return LayerView(
        index=index,
        checkpoint=checkpoint,
        statistics=statistics.layer(index) if statistics is not None else None,
        loss=statistics.gradients(index) if statistics and statistics.has_gradients else None,
        tile=tile,
    )


def _over_layers(worth: dict[int, torch.Tensor], budget: Budget, shape: Shape) -> dict[int, Budget]:
    """Each layer's budget of experts, where the model's best experts are kept."""
    total = budget.whole_experts(shape, layers=len(worth))
    least = shape.top_k if budget.drop_when_better else 1
    counts = counts_over_layers(worth, total, least=least) if worth else {}
    return {index: replace(budget, experts=count) for index, count in counts.items()}


def _spend(
    ladders: dict[int, Ladder], method: Method, budget: Budget, shape: Shape
) -> dict[int, LayerPlan]:
    """Hand out blocks: over the whole model where layers compare, else within each layer."""
    if not ladders:
        return {}
    block, most = budget.block_width, shape.width // budget.block_width
    total = min(budget.blocks(shape), most * shape.experts)
    if total < 1:
        raise PlanError(
            f"keep={budget.keep:g} leaves no block of {block} neurons in a layer",
            remedy="keep more, or use narrower blocks with --block-width",
        )
    if budget.uniform:
        counts = even_counts(total, shape.experts, most)
        return {index: ladder.plan(block, counts) for index, ladder in ladders.items()}
    curves = {index: ladder.curve(block) for index, ladder in ladders.items()}
    totals = [total] * len(ladders)
    if method.comparable and budget.across_layers:
        everywhere = budget.blocks(shape, layers=len(ladders))
        room = most * shape.experts * len(ladders)
        totals = distribute([c.error_K for c in curves.values()], min(everywhere, room))
    return {
        index: ladder.plan(block, curves[index].counts(count))
        for (index, ladder), count in zip(ladders.items(), totals, strict=True)
    }


def _settings(method: Method, budget: Budget) -> dict[str, Any]:
    settings = asdict(budget)
    if method.neurons is None:
        del settings["block_width"], settings["tile"]
        if method.worth is None:
            del settings["across_layers"]
    if not method.merges:
        del settings["coefficients"], settings["drop_when_better"]
    return settings
