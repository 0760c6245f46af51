"""Points for charts."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_serve.errors import RolloutError
from moe_serve.rollout.guards import Evidence
from moe_serve.rollout.trace import DATABASE, Trace


def evidence(upper: float) -> Evidence:
    """Of one guard."""
    return Evidence(
        guard="errors",
        unit="share",
        verdict="open",
        lower=-upper,
        upper=upper,
        margin=0.1,
        limit=0.1,
        pruned=(0, 1),
        original=(0, 1),
        basis="",
    )


def test_old_points_are_thinned_and_new_ones_are_all_there(tmp_path: Path) -> None:
    """Two hours at one point in 10 s: 720. The older hour keeps one a minute, some 60."""
    trace = Trace(tmp_path)
    for number in range(721):
        trace.add(10.0 * number, 0, [evidence(1.0 / (number + 1))])
    found = trace.points(0.0, 10_000)["errors"]
    # Thinned at every hundredth reading, last at 7000 s: all since 3400 s are there.
    assert [p.at for p in found if p.at >= 3400.0] == [3400.0 + 10.0 * i for i in range(381)]
    assert 55 <= len([p for p in found if p.at < 3400.0]) <= 58
    assert (found[-1].at, found[-1].lower, found[-1].upper) == (7200.0, -1 / 721, 1 / 721)
    few = trace.points(3600.0, 10)["errors"]
    assert 10 <= len(few) <= 11
    assert few[-1] == found[-1]


def test_no_points_are_no_error_and_a_broken_file_is_said(tmp_path: Path) -> None:
    """It names the file, which may go."""
    assert Trace(tmp_path).points(0.0) == {}
    (tmp_path / DATABASE).write_text("no database" * 100)
    with pytest.raises(RolloutError, match="decisions do not need it"):
        Trace(tmp_path).add(0.0, 0, [evidence(1.0)])
