"""How alike two requests of one user are, from the proxy's lines: what to set ``dependence`` to.

It is set beforehand and not followed while a rollout runs. Intervals that are valid whenever one
looks need a width that does not depend on what is looked at: an estimate that happens to be low for
an hour would let through what no later, higher one takes back, and a bound on it that held at all
times would need more users than the rollout itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moe_serve.rollout.users import Line, lines
from moe_serve.serving.variants import VARIANTS

_GROUPS: Final = 50
"""Of users, each left out once: the spread of what is left tells how sure the figure is."""
_FEWEST_EVENTS: Final = 20
_LEVEL: Final = 0.95
_SLOWEST: Final = 0.1

Array = NDArray[np.float64]
What = Literal["failed", "slow", "left"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Alike:
    """The correlation of one kind of event between two requests of a user."""

    what: What
    requests: int
    users: int
    events: int
    correlation: float | None
    """``None``: too few users with several requests, or too few events, to say anything."""
    at_most: float | None
    """Its upper end, 95 %."""

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {name: getattr(self, name) for name in self.__slots__}


def alike(file: Path, seconds: float | None = None) -> tuple[Alike, ...]:
    """Of failures, of requests that take long, and of those that clients give up.

    Args:
        file: the proxy's, as it is now.
        seconds: which a long request takes at least; by default as the slowest tenth does.

    Raises:
        OSError: it can't be read.
    """
    found = list(_whole(file))
    if seconds is None:
        times = [line.seconds for line in found if not line.left]
        seconds = float(np.quantile(times, 1.0 - _SLOWEST)) if times else math.inf
    limit = seconds
    return (
        _estimate("failed", [(x, x.failed) for x in found]),
        # One that failed or was given up may have been quick or slow for that reason.
        _estimate("slow", [(x, x.seconds >= limit) for x in found if not (x.failed or x.left)]),
        _estimate("left", [(x, x.left) for x in found]),
    )


def _whole(file: Path) -> Iterator[Line]:
    with file.open("rb") as opened:
        yield from lines(opened.read())


def _estimate(what: What, found: list[tuple[Line, bool]]) -> Alike:
    counts: dict[tuple[str, str], list[int]] = {}
    for line, happened in found:
        pair = counts.setdefault((line.variant, line.user), [0, 0])
        pair[0] += happened
        pair[1] += 1
    by_variant = {
        v: np.array([pair for (who, _), pair in sorted(counts.items()) if who == v], dtype=float)
        for v in VARIANTS
    }
    groups = {v: pairs for v, pairs in by_variant.items() if len(pairs)}
    events = sum(happened for _, happened in found)
    several = sum(pair[1] > 1 for pair in counts.values())
    told: tuple[float | None, float | None] = (None, None)
    if several >= 2 * _GROUPS and _FEWEST_EVENTS <= events <= len(found) - _FEWEST_EVENTS:
        told = _with_end(groups)
    return Alike(
        what=what,
        requests=len(found),
        users=len(counts),
        events=events,
        correlation=told[0],
        at_most=told[1],
    )


def correlation(groups: Mapping[str, Array]) -> float:
    """Intra-user correlation of a binary outcome; between users of one variant only.

    The analysis-of-variance estimator, which needs no model of how users differ: Ridout, Demétrio &
    Firth 1999, "Estimating intraclass correlation for binary data" (Biometrics 55), section 2.1.

    Args:
        groups: variant → ``[users, 2]``: events and requests.
    """
    users, requests, between, within, spread = 0, 0.0, 0.0, 0.0, 0.0
    for pairs in groups.values():
        k, n = pairs[:, 0], pairs[:, 1]
        total = n.sum()
        between += float((n * (k / n - k.sum() / total) ** 2).sum())
        within += float((k * (1.0 - k / n)).sum())
        spread += float(total - (n**2).sum() / total)
        users, requests = users + len(n), requests + float(total)
    freedom = max(1, users - len(groups))
    msb, msw = between / freedom, within / max(1.0, requests - users)
    typical = spread / freedom
    whole = msb + (typical - 1.0) * msw
    return (msb - msw) / whole if whole > 0.0 else 0.0


def _with_end(groups: Mapping[str, Array]) -> tuple[float, float]:
    """The correlation, and its upper end by a jackknife over groups of users."""
    rng = np.random.default_rng(0)
    drawn = {v: rng.permutation(len(pairs)) % _GROUPS for v, pairs in groups.items()}
    without = [
        correlation({v: pairs[drawn[v] != g] for v, pairs in groups.items()})
        for g in range(_GROUPS)
    ]
    whole = correlation(groups)
    deviation = math.sqrt((_GROUPS - 1) * float(np.var(without)))
    end = whole + float(stats.t.ppf(_LEVEL, _GROUPS - 1)) * deviation
    return whole, min(1.0, max(0.0, end))
