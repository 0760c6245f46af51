"""How far production's choice of experts is from calibration's: experts are kept for the latter."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client.samples import Sample

SELECTIONS: Final = "moe_serve_expert_selections_total"
ENOUGH: Final = 100
"""Selections per expert of a layer before it is compared. By chance alone a layer then differs by
about half of sqrt(2 N / (pi 100 N)): 0.04."""
_SPAN: Final = 1800.0
"""Seconds that are looked back, longer where traffic is low."""
_STEP: Final = 60.0
_MOST: Final = 64
"""Looks that are remembered; of more every second one is forgotten."""

Counts = Mapping[str, tuple[float, ...]]
"""Layer → selections of each expert."""


def distance(calibrated: Iterable[float], seen: Iterable[float]) -> float:
    """Share of the selections that went to other experts than calibration's: total variation.

    Args:
        calibrated: selections of each expert on the calibration texts.
        seen: and in production.

    Returns:
        0 (the same shares) to 1 (no expert in common).
    """
    p, q = list(calibrated), list(seen)
    if len(p) != len(q) or not sum(p) or not sum(q):
        raise ValueError("two layers of one model, with some selections each, can be compared")
    return sum(abs(a / sum(p) - b / sum(q)) for a, b in zip(p, q, strict=True)) / 2.0


class Drift:
    """Of one engine, over the last half hour."""

    def __init__(self, calibrated: Counts, clock: Callable[[], float] = time.monotonic) -> None:
        """What calibration selected, layer by layer."""
        self._calibrated = {layer: counts for layer, counts in calibrated.items() if any(counts)}
        self._clock = clock
        self._looks: deque[tuple[float, Counts]] = deque()

    def look(self, samples: Iterable[Sample]) -> dict[str, float]:
        """Layer → distance, of the layers that enough selections were counted in.

        An engine that began anew is compared by what it has counted since.
        """
        now, counts = self._clock(), self._counted(samples)
        if self._looks and _went_back(self._looks[-1][1], counts):
            self._looks.clear()
        if not self._looks or now - self._looks[-1][0] >= _STEP:
            self._looks.append((now, counts))
        if len(self._looks) > _MOST:
            self._looks = deque([*list(self._looks)[:-1:2], self._looks[-1]])
        base: Counts = {}
        # The youngest look that is old enough and leaves enough to compare.
        for at, then in self._looks:
            if now - at >= _SPAN and _enough(_grown(then, counts)):
                base = then
        while len(self._looks) > 1 and self._looks[0][1] is not base and base:
            self._looks.popleft()
        return {
            layer: distance(self._calibrated[layer], grown)
            for layer, grown in _grown(base, counts).items()
            if sum(grown) >= ENOUGH * len(grown)
        }

    def _counted(self, samples: Iterable[Sample]) -> Counts:
        found = {layer: [0.0] * len(counts) for layer, counts in self._calibrated.items()}
        for sample in samples:
            if sample.name == SELECTIONS and sample.labels.get("layer") in found:
                expert = int(sample.labels["expert"])
                if expert < len(found[sample.labels["layer"]]):
                    found[sample.labels["layer"]][expert] += sample.value
        return {layer: tuple(counts) for layer, counts in found.items()}


def _grown(before: Counts, now: Counts) -> Counts:
    return {
        layer: tuple(
            b - a for a, b in zip(before.get(layer, (0.0,) * len(counts)), counts, strict=True)
        )
        for layer, counts in now.items()
    }


def _enough(grown: Counts) -> bool:
    return all(sum(counts) >= ENOUGH * len(counts) for counts in grown.values())


def _went_back(before: Counts, now: Counts) -> bool:
    return any(sum(now[layer]) < sum(counts) for layer, counts in before.items())
