"""The interval of paired comparisons."""

from __future__ import annotations

import random

from benchmarks.serving.paired import interval, told


def test_the_interval_is_as_wide_as_starts_differ() -> None:
    """Equal values have none; where starts differ, more turns of them don't narrow it."""
    assert interval([[1.5] * 9] * 4) == (1.5, 1.5)
    assert told([[1.5] * 9] * 4) == "1.500× (1.500 to 1.500)"
    rng = random.Random(1)
    for turns in (5, 50):
        starts = [[m + rng.gauss(0.0, 0.001) for _ in range(turns)] for m in (0.9, 1.0, 1.1)]
        low, high = interval(starts)
        # One of 27 draws is the first start three times, which is more than 2.5 %.
        assert low < 0.95
        assert high > 1.05
