"""Geometry of the page's pictures: numbers in, SVG coordinates out.

The axis reaches from twice the margin below zero to three times above: what matters is on which
side of zero and margin an interval lies, not how wide it was at the start. What is beyond is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moe_serve.rollout.schema import PointOut

WIDTH: Final = 600.0
HEIGHT: Final = 120.0
_BELOW, _ABOVE = 2.0, 3.0
_THIN: Final = 2.0
"""Least extent of an interval, so that one known exactly is still seen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """An interval on a horizontal axis."""

    start: float
    length: float
    zero: float
    margin: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """An interval over time."""

    areas: tuple[str, ...]
    """One path per step: evidence begins anew with each."""
    changes: tuple[float, ...]
    """Where steps begin."""
    zero: float
    margin: float


def _share(value: float, margin: float) -> float:
    """Of the axis, from its low end, within it."""
    low, high = -_BELOW * margin, _ABOVE * margin
    return min(1.0, max(0.0, (value - low) / (high - low)))


def bar(lower: float, upper: float, margin: float) -> Bar:
    """Where an interval, zero and margin lie on an axis :data:`WIDTH` long."""
    start, end = (WIDTH * _share(value, margin) for value in (lower, upper))
    if end - start < _THIN:
        start = min(start, WIDTH - _THIN)
        end = start + _THIN
    return Bar(
        start=round(start, 1),
        length=round(end - start, 1),
        zero=round(WIDTH * _share(0.0, margin), 1),
        margin=round(WIDTH * _share(margin, margin), 1),
    )


def band(points: Sequence[PointOut], margin: float) -> Band | None:
    """How an interval went; ``None`` for less than two points."""
    if len(points) < 2:
        return None
    first, last = points[0].at, points[-1].at
    span = max(last - first, 1e-9)

    def spot(at: float, value: float) -> str:
        return f"{WIDTH * (at - first) / span:.1f},{HEIGHT * (1.0 - _share(value, margin)):.1f}"

    parts: list[list[PointOut]] = [[]]
    for point in points:
        if parts[-1] and parts[-1][-1].step != point.step:
            parts.append([])
        parts[-1].append(point)
    areas = []
    for number, part in enumerate(parts):
        # Up to where the next one begins, as it held until then.
        until = parts[number + 1][0].at if number + 1 < len(parts) else part[-1].at
        there = [(p.at, p.lower, p.upper) for p in part]
        there.append((until, part[-1].lower, part[-1].upper))
        over = [spot(at, upper) for at, _, upper in there]
        under = [spot(at, lower) for at, lower, _ in reversed(there)]
        areas.append(f"M{' L'.join([*over, *under])} Z")
    return Band(
        areas=tuple(areas),
        changes=tuple(round(WIDTH * (p[0].at - first) / span, 1) for p in parts[1:]),
        zero=round(HEIGHT * (1.0 - _share(0.0, margin)), 1),
        margin=round(HEIGHT * (1.0 - _share(margin, margin)), 1),
    )
