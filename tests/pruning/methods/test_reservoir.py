"""What a change of a layer does to its output, against the layer's own forward."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_serve.calibration.mixture import Mixture
from moe_serve.pruning.methods.reservoir import Reservoir
from tests.support.experts import mixture_of, random_unit


def changed(before: Mixture, after: Mixture, z: torch.Tensor) -> float:
    """Mean squared difference of two layers' outputs."""
    return float((after(z) - before(z)).square().sum(dim=1).mean())


def test_error_is_the_layers_own() -> None:
    """Two experts dropped, two others served by a new one: as the changed layer's forward says."""
    torch.manual_seed(0)
    units = [random_unit(e) for e in range(6)]
    mixture, z = mixture_of(units), torch.randn(60, 8)
    new = dataclasses.replace(random_unit(0), owners=(2, 5))
    seen = Reservoir.of(mixture, z)
    after = dataclasses.replace(
        mixture,
        router=dataclasses.replace(mixture.router, dropped=(0, 3)),
        units=(units[1], units[4], new),
    )
    found = seen.error(dropped=(0, 3), replaced={2: new, 5: new})
    assert found == pytest.approx(changed(mixture, after, z), rel=1e-5)
    assert seen.error(replaced={}) == 0.0


def test_every_fourth_token_only_judges() -> None:
    """Tokens 3 and 7 of ten; together the parts are all tokens."""
    torch.manual_seed(1)
    z = torch.randn(10, 8)
    seen = Reservoir.of(mixture_of([random_unit(e) for e in range(3)]), z)
    assert torch.equal(seen.held_out().z_SD, z[[3, 7]])
    assert torch.equal(seen.fitting().z_SD, z[[0, 1, 2, 4, 5, 6, 8, 9]])
    assert seen.held_out().output_NSD.shape == (3, 2, 8)
    parts = [seen.fitting(), seen.held_out()]
    drop = [part.error(dropped=(1,), replaced={}) for part in parts]
    assert seen.error(dropped=(1,), replaced={}) == pytest.approx((8 * drop[0] + 2 * drop[1]) / 10)
