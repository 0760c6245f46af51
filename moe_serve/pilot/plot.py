"""All options as points, bytes against loss: places in a drawing, its margins included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from unicodedata import east_asian_width

from moe_serve.pilot.decision import Baseline, Option, front
from moe_serve.report import words

WIDTH: Final = 640.0
HEIGHT: Final = 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 60.0, 20.0, 34.0, 46.0
_LETTER: Final = 7.2
"""Width of a letter of a label, at most; twice that where letters are as wide as high."""
_LINE: Final = 15.0
"""Height of a label."""
_REACH: Final = 2.0
"""How far the scale goes beyond the largest loss for the sake of an interval, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """What something covers."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether both cover a place."""
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.bottom <= other.top or other.bottom <= self.top)


def plot(
    options: Sequence[Option], baseline: Baseline, labels: Sequence[str], original: str
) -> dict[str, Any]:
    """Points, their intervals and labels, the line through the front, and both axes."""
    total = baseline.total_bytes
    largest = max(option.mean_kl for option in options)
    reaches = [o.mean_kl if o.mean_kl_high is None else o.mean_kl_high for o in options]
    highest = min(max(reaches), _REACH * largest) * 1.1 or 1.0
    lowest = max(0.0, min(option.total_bytes / total for option in options) - 0.05)

    def x(share: float) -> float:
        return _LEFT + (share - lowest) / (1.0 - lowest) * (WIDTH - _LEFT - _RIGHT)

    def y(kl: float) -> float:
        return HEIGHT - _BOTTOM - min(kl / highest, 1.0) * (HEIGHT - _TOP - _BOTTOM)

    line = [(1.0, 0.0), *((o.total_bytes / total, o.mean_kl) for o in front(options))]
    places = [(x(1.0), y(0.0)), *((x(o.total_bytes / total), y(o.mean_kl)) for o in options)]
    first, *rest = labelled(places, (original, *labels))
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "line": " ".join(f"{x(s):.1f},{y(k):.1f}" for s, k in line),
        "origin": first,
        "points": [
            point | {"option": option, "label": label, "ends": _ends(option, y)}
            for point, option, label in zip(rest, options, labels, strict=True)
        ],
        "xs": [(x(s), words.percent(s)) for s in ticks(lowest, 1.0)],
        "ys": [(y(k), f"{k:g}") for k in ticks(0.0, highest)],
        "left": _LEFT,
        "right": WIDTH - _RIGHT,
        "base": HEIGHT - _BOTTOM,
    }


def _ends(option: Option, y: Callable[[float], float]) -> tuple[float, float] | None:
    if option.mean_kl_low is None or option.mean_kl_high is None:
        return None
    return y(option.mean_kl_low), y(option.mean_kl_high)


def labelled(places: Sequence[tuple[float, float]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Each point with a place for its label where no point and no label before it is."""
    taken = [Box(left=x - 7, top=y - 7, right=x + 7, bottom=y + 7) for x, y in places]
    found = []
    for (x, y), label in zip(places, labels, strict=True):
        width = _LETTER * sum(2 if east_asian_width(c) in "WF" else 1 for c in label)
        tried = list(_around(x, y, width))
        chosen = next(
            (t for t in tried if not any(t[0].meets(box) for box in taken)),
            tried[0],
        )
        taken.append(chosen[0])
        box, anchor = chosen
        found.append(
            {
                "x": x,
                "y": y,
                "label_x": box.left if anchor == "start" else box.right,
                "label_y": box.bottom - 3.5,
                "anchor": anchor,
                "led": not box.top - 2 <= y <= box.bottom + 2,
            }
        )
    return found


def _around(x: float, y: float, width: float) -> Iterator[tuple[Box, str]]:
    """Where a label may stand within the drawing, the nearest first; above comes before below."""
    # Whole lines up and down: 0, 1, -1, 2, -2, …
    for number in range(13):
        away = _LINE * ((number + 1) // 2) * (1 if number % 2 else -1)
        for anchor in ("start", "end"):
            left = x + 10 if anchor == "start" else x - 10 - width
            box = Box(left=left, top=y - _LINE - away, right=left + width, bottom=y - away)
            if left >= _LEFT and box.right <= WIDTH and box.top >= 0 and box.bottom <= HEIGHT - 30:
                yield box, anchor
    left = max(_LEFT, min(x + 10, WIDTH - width))
    yield Box(left=left, top=y - _LINE, right=left + width, bottom=y), "start"


def ticks(low: float, high: float) -> list[float]:
    """Three to six round values between both ends: multiples of 1, 2, 2.5 or 5 tens."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1.0, 2.0, 2.5, 5.0, 10.0) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]
