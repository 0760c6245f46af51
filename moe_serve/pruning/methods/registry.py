"""The methods by name; each is a pure function.

One that chooses experts goes from a layer and a budget to a layer plan. One that chooses neurons
goes from a layer to its ladder; the budget is spent afterwards, over a layer or the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from moe_serve.calibration.gradients import Felt, tokens_felt
from moe_serve.errors import UsageError
from moe_serve.pruning.methods.drops import (
    constant_error,
    drop_aimer,
    drop_constant,
    drop_ean,
    drop_fisher,
    drop_frequency,
    drop_man,
    drop_msan,
    drop_random,
    drop_reap,
    drop_seer,
    drop_taylor,
)
from moe_serve.pruning.methods.merges import (
    merge_cka,
    merge_cka_weights,
    merge_gradient,
    merge_hc,
    merge_msmoe,
    merge_ream,
    merge_weights,
)
from moe_serve.pruning.methods.naee import drop_naee
from moe_serve.pruning.methods.neurons import (
    Ladder,
    block_heapr,
    block_magnitude,
    block_obs,
    block_taylor,
)
from moe_serve.pruning.methods.view import Budget, LayerView
from moe_serve.pruning.plan import LayerPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A registered method."""

    name: str
    experts: Callable[[LayerView, Budget], LayerPlan] | None = None
    """Set by a method whose unit is the expert."""
    neurons: Callable[[LayerView], Ladder] | None = None
    """Set by a method whose unit is the neuron."""
    merges: bool = False
    """Whether it merges experts, so that coefficients can be chosen."""
    worth: Callable[[LayerView], torch.Tensor] | None = None
    """Set by a method of experts whose budget runs over the whole model: what each expert of a
    layer is worth [N]. A layer keeps as many as it has among the model's best."""
    compares: bool = False
    """Whether it runs every expert of a layer on the reservoir."""
    pairs: bool = False
    """Whether it aligns the neurons of every pair of experts."""
    comparable: bool = False
    """Whether the ladders of different layers measure the same thing."""
    needs_texts: bool = True
    """Whether it needs calibration statistics."""
    loss: Felt = "neurons"
    """What it asks of the reverse pass, which its own run leaves out where it is nothing."""
    refit: bool = False
    """Whether what is kept is re-fitted unless the user says otherwise."""


METHODS: Final = {
    method.name: method
    for method in (
        Method(name="block-obs", neurons=block_obs, loss="metric", comparable=True, refit=True),
        Method(name="block-heapr", neurons=block_heapr, comparable=True),
        Method(name="block-taylor", neurons=block_taylor, comparable=True),
        Method(name="block-magnitude", neurons=block_magnitude, needs_texts=False),
        Method(name="drop-naee", experts=drop_naee, loss="nothing", compares=True),
        Method(name="drop-reap", experts=drop_reap, loss="nothing"),
        Method(name="drop-ean", experts=drop_ean, loss="nothing"),
        Method(name="drop-man", experts=drop_man, loss="nothing"),
        Method(name="drop-msan", experts=drop_msan, loss="nothing"),
        Method(name="drop-seer", experts=drop_seer, loss="nothing"),
        Method(name="drop-frequency", experts=drop_frequency, loss="nothing"),
        Method(name="drop-taylor", experts=drop_taylor),
        Method(name="drop-fisher", experts=drop_fisher),
        Method(
            name="drop-constant",
            experts=drop_constant,
            loss="metric",
            worth=constant_error,
            refit=True,
        ),
        Method(name="drop-aimer", experts=drop_aimer, needs_texts=False),
        Method(name="drop-random", experts=drop_random, needs_texts=False),
        Method(name="merge-cka", experts=merge_cka, loss="nothing", merges=True, compares=True),
        Method(name="merge-cka-weights", experts=merge_cka_weights, merges=True, needs_texts=False),
        Method(name="merge-hc", experts=merge_hc, loss="nothing", merges=True, compares=True),
        Method(
            name="merge-msmoe",
            experts=merge_msmoe,
            loss="nothing",
            merges=True,
            compares=True,
            worth=lambda view: view.observed().frequency(),
        ),
        Method(name="merge-ream", experts=merge_ream, loss="nothing", merges=True, compares=True),
        Method(
            name="merge-weights",
            experts=merge_weights,
            merges=True,
            pairs=True,
            needs_texts=False,
        ),
        Method(name="merge-gradient", experts=merge_gradient, merges=True, compares=True),
    )
}

AUTO: Final = "auto"


def gradient_tokens(name: str, hidden: int) -> int:
    """Tokens of which a method's own run takes the reverse pass at most, with texts."""
    return tokens_felt(method_named(name, texts=True).loss, hidden)


def method_named(name: str, *, texts: bool) -> Method:
    """Find a method; ``auto`` is ``block-obs`` with texts and ``block-magnitude`` without.

    Raises:
        UsageError: no such method, or it needs texts and there are none.
    """
    if name == AUTO:
        name = "block-obs" if texts else "block-magnitude"
    if name not in METHODS:
        raise UsageError(
            f"no method {name!r}",
            where="--method",
            remedy="choose from " + ", ".join([AUTO, *sorted(METHODS)]),
        )
    method = METHODS[name]
    if method.needs_texts and not texts:
        without = ", ".join(sorted(m.name for m in METHODS.values() if not m.needs_texts))
        raise UsageError(
            f"{name} needs calibration texts",
            where="--method",
            remedy=f"give --calibration PATH; from the weights alone: {without}",
        )
    return method
