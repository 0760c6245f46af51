"""How memory and time of a load are measured."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.serving.load import Watched, told


def test_the_most_memory_is_seen_though_it_was_given_back() -> None:
    """64 MiB written and freed within."""
    with Watched(clock=time.perf_counter) as watched:
        held = torch.ones(16 << 20)
        time.sleep(0.1)
        del held
    assert watched.seconds >= 0.1
    assert watched.most - watched.before == pytest.approx(64 << 20, rel=0.1)


def test_the_interval_is_that_of_the_median() -> None:
    """None where all are equal; one far off among nine does not move it far."""
    assert told([0.5] * 9) == "0.500× (0.500 to 0.500)"
    assert told([1.0] * 8 + [9.0]) == "1.000× (1.000 to 1.000)"
