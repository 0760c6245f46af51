"""Drift of routing: what is compared, over which time, and when nothing is said."""

from __future__ import annotations

import pytest
from prometheus_client.samples import Sample

from moe_serve.metrics.drift import SELECTIONS, Drift, distance

HALF_HOUR, MINUTE = 1800.0, 60.0


def counted(*experts: float, layer: str = "1") -> list[Sample]:
    """As an engine's page has it."""
    return [
        Sample(SELECTIONS, {"layer": layer, "expert": str(i)}, count)
        for i, count in enumerate(experts)
    ]


def test_distance_is_the_share_that_went_elsewhere() -> None:
    """(1/2, 1/2, 0) against (1/2, 1/4, 1/4): a quarter of the selections moved."""
    assert distance([2, 2, 0], [20, 10, 10]) == pytest.approx(0.25)
    assert distance([1, 1], [300, 300]) == 0.0
    assert distance([1, 0], [0, 7]) == 1.0


def test_few_selections_say_nothing() -> None:
    """Two experts need two hundred: one short of it the layer is absent, not zero."""
    drift = Drift({"1": (1, 1)}, clock=lambda: 0.0)
    assert drift.look(counted(150, 49)) == {}
    assert drift.look(counted(150, 50)) == {"1": pytest.approx(0.25)}


def test_the_last_half_hour_counts() -> None:
    """Long balanced, then only the first expert: 0 at first, 1/2 when the past is past."""
    now = 0.0
    drift = Drift({"1": (1, 1)}, clock=lambda: now)
    assert drift.look(counted(5000, 5000)) == {"1": 0.0}
    for step in range(1, 31):
        now = step * MINUTE
        found = drift.look(counted(5000 + 100 * step, 5000))
    # 3,000 of 13,000 were new: (8/13 - 1/2).
    assert now == HALF_HOUR
    assert found == {"1": pytest.approx(0.5)}


def test_low_traffic_looks_back_further() -> None:
    """Where half an hour has too few, all since the engine's start is compared."""
    now = 0.0
    drift = Drift({"1": (1, 1)}, clock=lambda: now)
    drift.look(counted(100, 100))
    now = HALF_HOUR
    # 20 new ones are not enough; of all 220, 120 and 100.
    assert drift.look(counted(120, 100)) == {"1": pytest.approx(120 / 220 - 0.5)}


def test_an_engine_that_began_anew_is_compared_since() -> None:
    """Counters that went back forget what was before them."""
    now = 0.0
    drift = Drift({"1": (1, 1)}, clock=lambda: now)
    drift.look(counted(5000, 5000))
    now = HALF_HOUR
    assert drift.look(counted(150, 0)) == {}
    assert drift.look(counted(300, 0)) == {"1": pytest.approx(0.5)}


def test_layers_that_calibration_does_not_know_are_left_out() -> None:
    """And experts beyond its count: another model's page breaks nothing."""
    drift = Drift({"1": (1, 1), "2": (0, 0)}, clock=lambda: 0.0)
    page = [*counted(300, 300, 7), *counted(900, 0, layer="2"), *counted(9, 9, layer="9")]
    assert drift.look(page) == {"1": 0.0}
