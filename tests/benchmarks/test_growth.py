"""An hour's growth and its interval."""

from __future__ import annotations

import random

import pytest

from benchmarks.serving.growth import Growth, beyond


def test_a_line_is_found_and_the_first_third_left_out() -> None:
    """2 a minute are 120 an hour, whatever happened before it settled."""
    readings = [(float(t), 0.0 if t < 600 else 100 + t / 30) for t in range(0, 1800, 2)]
    growth = Growth.of(readings)
    assert growth.slope == pytest.approx(120)
    assert growth.low == pytest.approx(120)
    assert growth.high == pytest.approx(120)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Readings that hang together from one to the next; 95 of 100 expected, 88 are still chance."""
    rng = random.Random(1)
    held = 0
    for _ in range(100):
        value, readings = 0.0, []
        for step in range(900):
            value = 0.8 * value + rng.gauss(0.0, 1.0)
            readings.append((2.0 * step, 500 + 2.0 * step * 30 / 3600 + value))
        growth = Growth.of(readings)
        held += growth.low <= 30 <= growth.high
    assert held >= 88


def test_what_grows_both_is_no_difference() -> None:
    """A filling cache."""
    theirs = [(float(t), t / 10) for t in range(100)]
    more = beyond([(at, value + 7) for at, value in theirs], theirs)
    assert [at for at, _ in more] == [at for at, _ in theirs]
    assert [value for _, value in more] == pytest.approx([7] * len(theirs))


def test_a_run_too_short_says_so() -> None:
    """Twelve spans need readings each."""
    with pytest.raises(ValueError, match="too few readings"):
        Growth.of([(float(t), 1.0) for t in range(9)])
