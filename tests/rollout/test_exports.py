"""Metrics of a stack whose routes can't be asked."""

from __future__ import annotations

from moe_serve.errors import RolloutError
from moe_serve.rollout.exports import Patience


def test_what_fails_slowly_is_not_asked_at_every_scrape() -> None:
    """Two seconds in vain: left alone for half a minute. What fails at once is asked each time."""
    now, asked = 0.0, 0

    def fails(seconds: float) -> float:
        nonlocal now, asked
        now, asked = now + seconds, asked + 1
        raise RolloutError("no answer")

    patience = Patience(clock=lambda: now)
    assert [patience.ask(lambda: fails(0.0)) for _ in range(3)] == [None] * 3
    assert asked == 3
    assert [patience.ask(lambda: fails(2.0)) for _ in range(3)] == [None] * 3
    assert asked == 4
    now += 30.0
    assert patience.ask(lambda: 0.5) == 0.5
