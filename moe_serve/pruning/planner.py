"""From statistics to a plan, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.formats import form_named
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.table import MOST_BLOCKS
from moe_serve.errors import PlanError
from moe_serve.families import Shape
from moe_serve.progress import Progress
from moe_serve.pruning import auto
from moe_serve.pruning.device import CPU
from moe_serve.pruning.fitting.split import one_row_each
from moe_serve.pruning.methods.allocation import distribute
from moe_serve.pruning.methods.grouping import counts_over_layers
from moe_serve.pruning.methods.neurons import Ladder, even_counts
from moe_serve.pruning.methods.registry import AUTO, METHODS, Method
from moe_serve.pruning.methods.view import Budget, LayerView
from moe_serve.pruning.native import choose, weigh
from moe_serve.pruning.numbers import number_format
from moe_serve.pruning.plan import LayerPlan, Plan, Refit, RouterFit
from moe_serve.pruning.selection import Selection
from moe_serve.pruning.trial import Trial


@torch.inference_mode()
def make_plan(
    checkpoint: Checkpoint,
    statistics: Statistics | None,
    selection: Selection,
    progress: Progress,
    *,
    form: str = "compact",
    trial: Trial | None = None,
    device: torch.device = CPU,
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
        device: where large matrices are inverted.

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

    def view(index: int) -> LayerView:
        return LayerView.of(checkpoint, statistics, index, tile=budget.tile, device=device)

    def every() -> Iterator[LayerView]:
        for index in layers:
            progress.advance()
            yield view(index)

    weighed: dict[str, Any] = {}
    by = Refit() if refit else None
    name = method.name
    if (
        selection.method == AUTO
        and trial is not None
        and layers
        and not (budget.uniform or budget.constants)
    ):
        chosen = auto.choose(_leaders(every(), budget, shape), view, budget, trial, by)
        planned, name, weighed = chosen.layers, chosen.method, chosen.record
    elif budget.uniform and method.neurons is not None and method.comparable and layers:
        planned, weighed = choose(
            weigh(every(), method.neurons, budget.keep),
            (lambda name, layers: trial.measure(name, layers, by)) if trial is not None else None,
        )
    elif method.neurons is not None:
        planned = _spend(
            {seen.index: method.neurons(seen) for seen in every()}, method, budget, shape
        )
    else:
        planned = _by_experts(checkpoint, every, method, budget, shape)
    router = RouterFit() if selection.router_refit and planned else None
    if router is not None and trial is not None:
        router, found = _worth_it(router, planned, by, trial)
        weighed |= found
    plan = Plan(
        model=checkpoint.path.resolve().name,
        fingerprint=checkpoint.fingerprint(),
        statistics_sha256=statistics.sha256 if statistics is not None else None,
        method=name,
        settings=_settings(method, budget) | weighed,
        seed=selection.seed,
        keep=budget.keep,
        refit=by if planned else None,
        router=router,
        heal=selection.training if planned else None,
        balance=statistics.balance if statistics is not None else None,
        layers=planned,
        numbers=number_format(checkpoint, planned, refit=refit),
    )
    plan.check(checkpoint)
    # Refuses what this format can't express.
    form_named(form, checkpoint, plan.table(), plan.top_k)
    return plan


def _by_experts(
    checkpoint: Checkpoint,
    every: Callable[[], Iterable[LayerView]],
    method: Method,
    budget: Budget,
    shape: Shape,
) -> dict[int, LayerPlan]:
    """Every layer by a method of whole experts."""
    if method.experts is None:
        return {}
    budgets: dict[int, Budget] = {}
    if method.worth is not None and budget.across_layers and not budget.uniform:
        worth = {seen.index: method.worth(seen) for seen in every()}
        budgets = _over_layers(worth, budget, shape)
    planned = {
        seen.index: method.experts(seen, budgets.get(seen.index, budget)) for seen in every()
    }
    if budget.uniform and method.merges:
        planned = one_row_each(checkpoint, planned)
    if budget.constants:
        planned = {index: layer.with_constants() for index, layer in planned.items()}
    return planned


def _worth_it(
    router: RouterFit, planned: dict[int, LayerPlan], refit: Refit | None, trial: Trial
) -> tuple[RouterFit | None, dict[str, Any]]:
    """The re-fit of the router where the whole model is better with it, and what was measured."""
    fits = {
        name: trial.measure(f"{name}-router", planned, refit, by)
        for name, by in (("without", None), ("with", router))
    }
    better = fits["with"].mean < fits["without"].mean
    return router if better else None, {
        "router_refit": {name: kl._asdict() for name, kl in fits.items()}
    }


def _leaders(
    views: Iterable[LayerView], budget: Budget, shape: Shape
) -> dict[str, dict[int, LayerPlan]]:
    """Plans for the whole model by the methods that ``auto`` tries on it, in one pass."""
    ladders: dict[str, dict[int, Ladder]] = {name: {} for name in auto.LEADERS}
    for seen in views:
        for name, found in ladders.items():
            if (neurons := METHODS[name].neurons) is not None:
                found[seen.index] = neurons(seen)
    return {name: _spend(found, METHODS[name], budget, shape) for name, found in ladders.items()}


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
            where="--keep",
        )
    if budget.uniform:
        counts = even_counts(total, shape.experts, most)
        return {index: ladder.plan(block, counts) for index, ladder in ladders.items()}
    curves = {index: ladder.curve(block) for index, ladder in ladders.items()}
    totals = [total] * len(ladders)
    if method.comparable and budget.across_layers:
        everywhere = budget.blocks(shape, layers=len(ladders))
        # Of --block-width's more may be asked, which processors serve.
        cap = min(most * shape.experts, max(MOST_BLOCKS, total))
        errors = [c.error_K[: cap + 1] for c in curves.values()]
        totals = distribute(errors, min(everywhere, cap * len(ladders)))
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
