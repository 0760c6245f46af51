"""``--method auto``: the best of the methods, layer by layer, as measured on held-out tokens.

Methods that choose neurons are tried on the whole model, each with its own budget over the layers.
The best of them is the plan to beat: in every layer the other methods get the bytes it spends
there, all that are not far behind are compensated on the pruned model's own inputs, and the least
error in the loss's metric is taken. The mixture of methods that comes of it has to measure better
on the whole model than what it started from. The first leader is weighed so before it is known to
be the best: where it wins every layer, that walk has measured it on the whole model too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from moe_serve.errors import PlanError
from moe_serve.families import Shape
from moe_serve.pruning.ground import Measured
from moe_serve.pruning.methods.registry import METHODS
from moe_serve.pruning.methods.view import Budget, LayerView
from moe_serve.pruning.plan import LayerPlan, Refit
from moe_serve.pruning.trial import Option, Pick, Trial

LEADERS: Final = ("block-obs", "block-heapr")
"""Tried on the whole model."""
RIVALS: Final = ("drop-naee", "drop-taylor", "merge-msmoe", "merge-cka")
"""Tried in each layer: published rules for whole experts, those that measured best and one that
finds copies, whichever are used most."""
MERGED_WIDTH: Final = 4096
"""Aligning the neurons of wider experts takes hours; merges are not weighed there."""

Layers = dict[int, LayerPlan]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighed:
    """The outcome."""

    layers: Layers
    method: str
    """Its name where one method won everywhere, else ``auto``."""
    record: dict[str, Any]
    """What was weighed, for the plan."""


def rivals(shape: Shape) -> tuple[str, ...]:
    """Methods of whole experts that are weighed at a model's sizes."""
    return tuple(name for name in RIVALS if not METHODS[name].merges or shape.width <= MERGED_WIDTH)


def choose(
    leaders: Mapping[str, Layers],
    view: Callable[[int], LayerView],
    budget: Budget,
    trial: Trial,
    refit: Refit | None,
) -> Weighed:
    """Weigh methods.

    Args:
        leaders: plans for the whole model, by method.
        view: a layer's weights and statistics.
        budget: of the whole model.
        trial: where they are measured.
        refit: how what is kept is re-fitted.
    """
    first, *others = leaders
    measured = {name: trial.measure(name, leaders[name], refit) for name in others}
    found = _weigh(first, leaders, view, budget, trial, refit)
    if found.pure:
        measured[first] = found.measured
    else:
        measured[first] = trial.measure(first, leaders[first], refit)
    best = min(leaders, key=lambda name: measured[name].mean)
    if best != first:
        found = _weigh(best, leaders, view, budget, trial, refit)
    whole = {name: measured[name]._asdict() for name in leaders}
    if not found.pure:
        whole["mixture"] = found.measured._asdict()
    layers = {
        str(i): {"taken": p.name, "error": p.errors, "uncompensated": p.bare}
        for i, p in found.picks.items()
    }
    record = {"weighed": {"whole_model": whole, "layers": layers}}
    if found.pure or found.measured.mean >= measured[best].mean:
        return Weighed(layers=leaders[best], method=best, record=record)
    mixture = {index: pick.plan for index, pick in found.picks.items()}
    return Weighed(layers=mixture, method="auto", record=record)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mixture:
    """What is best in each layer, given a leader's bytes there."""

    picks: dict[int, Pick]
    measured: Measured
    pure: bool
    """Whether the leader is best in all."""


def _weigh(
    base: str,
    leaders: Mapping[str, Layers],
    view: Callable[[int], LayerView],
    budget: Budget,
    trial: Trial,
    refit: Refit | None,
) -> _Mixture:
    plans = leaders[base]

    def options(index: int) -> list[Option]:
        found = [Option(name=base, plan=plans[index])]
        found += [
            Option(name=name, plan=layers[index])
            for name, layers in leaders.items()
            if name != base
            and index in layers
            and layers[index].neurons_kept() <= plans[index].neurons_kept()
        ]
        return found + _whole_experts(view(index), plans[index], budget)

    picks, measured = trial.pick(
        f"weigh-{base}", plans, options, lambda index: view(index).gradients(), refit
    )
    pure = all(pick.name == base for pick in picks.values())
    return _Mixture(picks=picks, measured=measured, pure=pure)


def _whole_experts(view: LayerView, base: LayerPlan, budget: Budget) -> list[Option]:
    """The plans of methods for whole experts at no more than a layer's bytes."""
    count = base.neurons_kept() // view.shape.width
    same = dataclasses.replace(budget, block_width=view.shape.width, experts=count)
    found = []
    for name in rivals(view.shape):
        method = METHODS[name]
        if method.experts is None:
            continue
        try:
            found.append(Option(name=name, plan=method.experts(view, same)))
        except PlanError:
            continue  # Too few would stay for the router: no option here.
    return found
