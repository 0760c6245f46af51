"""Seconds of a run, from what its steps take."""

from __future__ import annotations

from moe_serve.pruning.forecasts.forecast import Rates, Step


def test_seconds_follow_from_rates() -> None:
    """10 / 5 on the device, 6 / 1 on the processor, 30 / 10 of reading, 4 / 1 of writing."""
    rates = Rates(flops=5, processor_flops=1, read=10, write=1)
    step = Step(
        name="x", passes=1, flops=10, processor_flops=6, read=30, written=4, memory=0, disk=0
    )
    assert step.seconds(rates) == 2 + 6 + 3 + 4
