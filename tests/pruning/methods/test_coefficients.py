"""Coefficients against hand arithmetic and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_serve.errors import UsageError
from moe_serve.pruning.methods.coefficients import (
    COEFFICIENTS,
    Evidence,
    coefficients_named,
    frequency,
    least_squares,
    saliency,
    uniform,
)
from moe_serve.pruning.methods.reservoir import Reservoir
from tests.support.experts import mixture_of, random_unit, shuffled
from tests.support.statistics import layer_statistics

NOTHING = Evidence(statistics=None, reservoir=None)


def test_counts_and_saliency_are_scaled_to_one() -> None:
    """Counts 10, 30, 60; saliency 2/10, 0/30 (taken as the least above zero, .1), 6/60."""
    seen = layer_statistics(count=[10.0, 30.0, 60.0], weighted_norm=[2.0, 0.0, 6.0])
    evidence = Evidence(statistics=seen, reservoir=None)
    assert uniform([0, 2], evidence).tolist() == [0.5, 0.5]
    assert frequency([0, 1], evidence).tolist() == pytest.approx([0.25, 0.75])
    assert saliency([0, 1, 2], evidence).tolist() == pytest.approx([0.5, 0.25, 0.25])


def test_members_that_nothing_reached_count_alike() -> None:
    """0 of 0 is no reason for NaN."""
    seen = layer_statistics(count=[0.0, 0.0, 5.0], weighted_norm=[0.0, 0.0, 0.0])
    evidence = Evidence(statistics=seen, reservoir=None)
    assert frequency([0, 1], evidence).tolist() == [0.5, 0.5]
    assert saliency([0, 1], evidence).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("seed", range(4))
def test_least_squares_is_the_best_on_the_simplex(seed: int) -> None:
    """No point of a fine grid over c0 + c1 + c2 = 1 has less error."""
    torch.manual_seed(seed)
    mixture = mixture_of([random_unit(e) for e in range(4)])
    seen = Reservoir.of(mixture, torch.randn(300, 8))
    members = [0, 1, 3]
    found = least_squares(members, Evidence(statistics=None, reservoir=seen))
    weight = seen.weights_SN[:, members].double()
    output = seen.output_NSD[members].double()

    def error(c: torch.Tensor) -> float:
        merged = torch.einsum("g,gsd->sd", c, output)
        original = torch.einsum("sg,gsd->sd", weight, output)
        return float((original - weight.sum(1, keepdim=True) * merged).square().sum())

    assert float(found.sum()) == pytest.approx(1.0)
    assert float(found.min()) >= 0
    grid = [
        torch.tensor([a, b, 1 - a - b], dtype=torch.float64)
        for a in np.linspace(0, 1, 51)
        for b in np.linspace(0, 1 - a, 51)
    ]
    assert error(found) <= min(map(error, grid)) * (1 + 1e-9)


def test_experts_that_put_nothing_out_are_averaged() -> None:
    """Tokens of zeros: no error to make less, and no 0 / 0."""
    seen = Reservoir.of(mixture_of([random_unit(e) for e in range(3)]), torch.zeros(20, 8))
    found = least_squares([0, 2], Evidence(statistics=None, reservoir=seen))
    assert found.tolist() == [0.5, 0.5]


def test_least_squares_leaves_out_a_member_that_serves_nobody() -> None:
    """Only expert 0's tokens are there: the merged expert is expert 0."""
    torch.manual_seed(5)
    mixture = mixture_of([random_unit(e) for e in range(3)], top_k=1)
    z = torch.randn(4000, 8)
    z = z[mixture.router(z)[:, 0] > 0][:100]
    seen = Reservoir.of(mixture, z)
    found = least_squares([0, 1], Evidence(statistics=None, reservoir=seen))
    assert found.tolist() == pytest.approx([1.0, 0.0], abs=1e-9)


def test_least_squares_of_equal_members_is_even() -> None:
    """Every choice is as good; the even one is taken."""
    torch.manual_seed(6)
    unit = random_unit(0)
    units = [unit, shuffled(unit, 1, [5, 4, 3, 2, 1, 0]), random_unit(2)]
    seen = Reservoir.of(mixture_of(units), torch.randn(50, 8))
    found = least_squares([0, 1], Evidence(statistics=None, reservoir=seen))
    assert found.tolist() == pytest.approx([0.5, 0.5])


def test_names_and_texts_are_checked() -> None:
    """An unknown rule lists the known; one that needs texts says so."""
    with pytest.raises(UsageError, match="no coefficients 'best'") as unknown:
        coefficients_named("best", texts=True)
    assert all(name in str(unknown.value) for name in COEFFICIENTS)
    with pytest.raises(UsageError, match="qp needs calibration texts"):
        coefficients_named("qp", texts=False)
    assert coefficients_named("uniform", texts=False) is uniform
    for rule in (frequency, saliency, least_squares):
        with pytest.raises(UsageError, match="calibration texts"):
            rule([0, 1], NOTHING)
