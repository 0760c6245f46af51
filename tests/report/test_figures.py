"""Places of what is drawn."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.report.figures import spread


def test_labels_move_apart_by_hand() -> None:
    """The lower of two is pushed down; at the bottom both move up; alone nothing moves."""
    assert spread([0.5, 0.51], 0.1) == pytest.approx([0.5, 0.6])
    assert spread([1.0, 0.99], 0.1) == pytest.approx([1.0, 0.9])
    assert spread([0.2, 0.8], 0.1) == [0.2, 0.8]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_labels_keep_their_order_and_distance(places: list[float]) -> None:
    """All within the drawing where there is room for them."""
    moved = spread(places, 0.1)
    ranked = sorted(range(len(places)), key=lambda n: (places[n], moved[n]))
    for before, after in pairwise(ranked):
        assert moved[after] - moved[before] >= 0.1 - 1e-9
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in moved)
