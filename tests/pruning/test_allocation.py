"""Handing out blocks, against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.errors import PlanError
from moe_serve.pruning.allocation import allocate


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
