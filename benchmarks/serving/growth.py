"""How fast something grew, and within what limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import stats

SETTLED: Final = 1 / 3
"""Of the time; allocators fill their pools before."""
SPANS: Final = 12
"""Spans whose means stand for single readings, which hang together from one to the next."""

Readings = Sequence[tuple[float, float]]
"""Seconds and what was read then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """An hour's growth with its 95 % interval, in the readings' unit."""

    slope: float
    low: float
    high: float

    @classmethod
    def of(cls, readings: Readings) -> Growth:
        """A line through the means of equal spans of the settled time.

        Raises:
            ValueError: a span holds no reading.
        """
        times, values = np.array(readings, dtype=float).T
        settled = times >= times[-1] * SETTLED
        times, values = times[settled] / 3600, values[settled]
        edges = np.linspace(times[0], times[-1], SPANS + 1)[1:-1]
        spans = np.digitize(times, edges)
        if len(set(spans.tolist())) < SPANS:
            raise ValueError("too few readings")
        means = np.array(
            [[times[spans == span].mean(), values[spans == span].mean()] for span in range(SPANS)]
        )
        line = stats.linregress(means[:, 0], means[:, 1])
        reach = float(stats.t.ppf(0.975, SPANS - 2) * line.stderr)
        slope = float(line.slope)
        return cls(slope=slope, low=slope - reach, high=slope + reach)


def beyond(ours: Readings, theirs: Readings) -> list[tuple[float, float]]:
    """What one read more than the other at the same moments."""
    return [(at, a - b) for (at, a), (_, b) in zip(ours, theirs, strict=True)]
