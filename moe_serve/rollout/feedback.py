"""Votes on answers: counted per variant, in memory like an engine's own counters.

Nothing of a vote is kept but its count. Whoever reaches the control API can vote, so votes are
taken at a bounded rate: a flood neither fills anything nor is counted in full.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from moe_serve.serving.variants import VARIANTS

_PER_SECOND: Final = 50.0
_BURST: Final = 200.0
"""Votes taken at once after a quiet time."""


@dataclass(kw_only=True, slots=True)
class Votes:
    """Cumulative counts; a restart begins anew, as it does for an engine's."""

    clock: Callable[[], float] = time.monotonic
    counts: dict[str, list[int]] = field(
        default_factory=lambda: {variant: [0, 0] for variant in VARIANTS}
    )
    """Variant → [against, all]."""
    _credit: float = _BURST
    _at: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, variant: str, *, good: bool) -> bool:
        """Count one; ``False``: too many came, and it was not counted."""
        with self._lock:
            now = self.clock()
            passed = 0.0 if self._at is None else now - self._at
            self._at = now
            self._credit = min(_BURST, self._credit + passed * _PER_SECOND)
            if self._credit < 1.0:
                return False
            self._credit -= 1.0
            self.counts[variant][0] += not good
            self.counts[variant][1] += 1
            return True

    def totals(self) -> dict[tuple[str, str], float]:
        """(variant, ``good`` or ``bad``) → votes, for the metrics."""
        found = {}
        for variant in VARIANTS:
            against, number = self.counted(variant)
            found[variant, "bad"], found[variant, "good"] = against, number - against
        return found

    def counted(self, variant: str) -> tuple[float, float]:
        """(against, all)."""
        with self._lock:
            against, number = self.counts[variant]
        return float(against), float(number)
