"""The methods by name. A method is a pure function from a layer and a budget to a layer plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from moe_serve.errors import UsageError
from moe_serve.pruning.drops import drop_frequency, drop_random, drop_reap
from moe_serve.pruning.merging import merge_cka
from moe_serve.pruning.neurons import block_magnitude, block_obs
from moe_serve.pruning.plan import LayerPlan
from moe_serve.pruning.view import Budget, LayerView


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A registered method."""

    name: str
    choose: Callable[[LayerView, Budget], LayerPlan]
    needs_texts: bool = True
    """Whether it needs calibration statistics."""
    blocks: bool = False
    """Whether it chooses neurons (a budget in bytes) or whole experts."""
    refit: bool = False
    """Whether what is kept is re-fitted unless the user says otherwise."""


METHODS: Final = {
    method.name: method
    for method in (
        Method(name="block-obs", choose=block_obs, blocks=True, refit=True),
        Method(name="block-magnitude", choose=block_magnitude, needs_texts=False, blocks=True),
        Method(name="drop-reap", choose=drop_reap),
        Method(name="drop-frequency", choose=drop_frequency),
        Method(name="drop-random", choose=drop_random, needs_texts=False),
        Method(name="merge-cka", choose=merge_cka),
    )
}

AUTO: Final = "auto"


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
