"""Small mixtures made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_serve.calibration.mixture import Mixture, Router, Unit
from moe_serve.families import Routing


def random_unit(owner: int, *, width: int = 6, hidden: int = 8) -> Unit:
    """An expert of random weights."""
    return Unit(
        owners=(owner,),
        gate_FD=torch.randn(width, hidden),
        up_FD=torch.randn(width, hidden),
        down_DF=torch.randn(hidden, width),
    )


def shuffled(unit: Unit, owner: int, order: Sequence[int]) -> Unit:
    """The same function; its neuron i is ``unit``'s neuron ``order[i]``."""
    index = list(order)
    return Unit(
        owners=(owner,),
        gate_FD=unit.gate_FD[index],
        up_FD=unit.up_FD[index],
        down_DF=unit.down_DF[:, index],
    )


def mixture_of(units: Sequence[Unit], *, top_k: int = 2) -> Mixture:
    """A layer of these experts behind a random softmax router that renormalises."""
    hidden = units[0].gate_FD.shape[1]
    router = Router(
        weight_ND=torch.randn(len(units), hidden), rule=Routing(top_k=top_k, renormalise=True)
    )
    return Mixture(router=router, units=tuple(units), activation=torch.nn.functional.silu)
