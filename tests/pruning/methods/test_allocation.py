"""Handing out blocks, against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.errors import PlanError
from moe_serve.pruning.methods.allocation import allocate, curve, distribute


@given(seed=st.integers(0, 500), total=st.integers(0, 9))
def test_allocation_is_optimal(seed: int, total: int) -> None:
    """No way to hand out the blocks has a smaller summed error."""
    errors = np.sort(np.random.default_rng(seed).random((3, 4)), axis=1)[:, ::-1].copy()
    counts = allocate(errors, total)
    assert sum(counts) == total
    cost = sum(errors[e, c] for e, c in enumerate(counts))
    choices = (c for c in itertools.product(range(4), repeat=3) if sum(c) == total)
    best = min(sum(errors[e, c] for e, c in enumerate(choice)) for choice in choices)
    assert cost == pytest.approx(best)


def test_too_many_blocks_are_refused() -> None:
    """More blocks than places is a contradiction, not a crash."""
    with pytest.raises(PlanError, match="10 blocks do not fit 3 experts of 3 each"):
        allocate(np.ones((3, 4)), 10)


@given(seed=st.integers(0, 500), total=st.integers(2, 12))
def test_distribution_over_layers_is_optimal(seed: int, total: int) -> None:
    """No totals per layer, each at least one, have a smaller summed error."""
    errors = np.sort(np.random.default_rng(seed).random((2, 2, 4)), axis=2)[:, :, ::-1].copy()
    curves = [curve(layer).error_K for layer in errors]
    counts = distribute(curves, total)
    assert sum(counts) == total
    assert min(counts) >= 1
    choices = [c for c in itertools.product(range(1, 7), repeat=2) if sum(c) == total]
    best = min(sum(curves[i][c] for i, c in enumerate(choice)) for choice in choices)
    assert sum(curves[i][c] for i, c in enumerate(counts)) == pytest.approx(best)


def test_a_curve_is_the_allocation_at_every_total() -> None:
    """What a curve promises is what its counts cost."""
    errors = np.sort(np.random.default_rng(1).random((3, 5)), axis=1)[:, ::-1].copy()
    found = curve(errors)
    # Twelve places, and a way to fill any number of them.
    assert np.isfinite(found.error_K).tolist() == [True] * 13
    for total in range(13):
        counts = found.counts(total)
        assert sum(counts) == total
        assert sum(errors[e, c] for e, c in enumerate(counts)) == pytest.approx(
            found.error_K[total]
        )


@pytest.mark.parametrize("total", [1, 7])
def test_an_impossible_distribution_is_refused(total: int) -> None:
    """Fewer blocks than layers, or more than there is room for."""
    with pytest.raises(PlanError, match="can't be spread over 2 layers"):
        distribute([np.array([3.0, 2.0, 1.0, 0.0])] * 2, total)
