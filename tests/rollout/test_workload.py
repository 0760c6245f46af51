"""Made-up traffic is what its scenario says."""

from __future__ import annotations

import numpy as np
import pytest

from moe_serve.rollout.workload import COUNTS, Scenario, Traffic
from moe_serve.serving.variants import ORIGINAL, PRUNED

INTERVALS = 200


def counted(scenario: Scenario, percent: float = 50.0, seed: int = 0) -> dict[str, np.ndarray]:
    """Variant → its counters after some hours."""
    traffic = Traffic(scenario, seed)
    for _ in range(INTERVALS):
        found = traffic.next(percent, 0.0)
    return {variant: counts for variant, (_, counts) in found.items()}


def test_equal_seeds_give_equal_traffic() -> None:
    """And others others."""
    first, again, other = (counted(Scenario(), seed=seed)[PRUNED] for seed in (1, 1, 2))
    assert first.shape == (COUNTS,)
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("users", [0, 5000])
def test_shares_are_those_of_the_scenario(users: int) -> None:
    """Within four standard errors, eight where users are alike; pruned adds its own."""
    scenario = Scenario(users=users, more_abandoned=0.05, more_truncated=0.1)
    found = counted(scenario)
    for variant, more in ((ORIGINAL, 0.0), (PRUNED, 1.0)):
        requests, failed, _, done, _, _, cut, empty, left = found[variant]
        assert requests == done + failed
        for events, trials, share in (
            (left, requests, 0.1 + 0.05 * more),
            (cut, done, 0.2 + 0.1 * more),
            (empty, done, 0.005),
        ):
            error = np.sqrt(share * (1.0 - share) / trials) * (8.0 if users else 4.0)
            assert events / trials == pytest.approx(share, abs=error)


def test_a_regression_begins_when_it_is_said_to() -> None:
    """Before that the variants are alike."""
    late = counted(Scenario(more_failures=0.5, onset=1e9))
    early = counted(Scenario(more_failures=0.5))
    assert late[PRUNED][1] < 0.01 * late[PRUNED][0] < early[PRUNED][1]
    assert early[ORIGINAL][1] < 0.01 * early[ORIGINAL][0]
