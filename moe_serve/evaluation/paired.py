"""Two models on the same items: what differs, and how sure that is.

Every figure is of the differences item by item, never of two averages: most of what makes an item
hard is hard for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import stats

LEVEL: Final = 0.95
VERDICTS: Final = ("better", "worse", "unsettled", "same")
BETTER, WORSE, UNSETTLED, SAME = VERDICTS


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """One measure of both models over the same items."""

    items: int
    original: float
    """Mean over the items."""
    pruned: float
    difference: float
    """Pruned minus original."""
    error: float | None
    """Its standard error; ``None``: one item says nothing of how others vary."""
    freedom: float
    """Degrees of freedom of that."""
    low: float | None
    """95 % interval of the difference over items like these."""
    high: float | None
    p: float | None
    """Of a difference at least this large if there were none; two-sided."""
    test: str
    """Where ``p`` is from: ``mcnemar-exact`` or ``t``."""
    only_original: int | None = None
    """Of items that are right or wrong: those that only the original gets right."""
    only_pruned: int | None = None
    left_out: int = 0
    """Items for which one of both is no number."""

    def verdict(self, *, higher_is_better: bool) -> str:
        """``better`` or ``worse`` where interval and test both say so.

        ``same`` for a model and itself, else ``unsettled``.
        """
        if self.difference == 0 and self.error == 0:
            return SAME
        if self.low is None or self.high is None or self.p is None or self.p >= 1 - LEVEL:
            return UNSETTLED
        if self.low <= 0 <= self.high:
            return UNSETTLED
        return BETTER if (self.difference > 0) == higher_is_better else WORSE

    def to_json(self, *, higher_is_better: bool) -> dict[str, Any]:
        """As in ``compare --json``."""
        return {
            "items": self.items,
            "original": self.original,
            "pruned": self.pruned,
            "difference": self.difference,
            "interval": None
            if self.low is None or self.high is None
            else {
                "low": self.low,
                "high": self.high,
                # Of «± that»: the further end, where they are not equally far.
                "half": max(self.difference - self.low, self.high - self.difference),
            },
            "p": self.p,
            "test": self.test,
            "only_original": self.only_original,
            "only_pruned": self.only_pruned,
            "higher_is_better": higher_is_better,
            "verdict": self.verdict(higher_is_better=higher_is_better),
            "left_out": self.left_out,
        }


def paired(
    original: Sequence[float],
    pruned: Sequence[float],
    *,
    identical: bool = False,
    left_out: int = 0,
) -> Paired:
    """Compare two models' values on the same items, in the same order.

    Items that are right or wrong: McNemar's exact test (a binomial on the items that one alone
    gets right), and the interval of Agresti and Min (2005), which adds half an item to each of
    the four cells; with fewer than about five items that differ it is too wide rather than too
    narrow. Other values: Student's t on the differences.

    Args:
        original: one value per item.
        pruned: likewise.
        identical: both gave the very same answers, so that nothing is left to chance.
        left_out: how many items more there were, for which one of both is no number.
    """
    before, after = (np.asarray(values, dtype=np.float64) for values in (original, pruned))
    count, difference = len(before), float(after.mean() - before.mean())
    binary = bool(np.isin(np.concatenate([before, after]), (0.0, 1.0)).all())
    only = (int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum()))
    shape: dict[str, Any] = {
        "items": count,
        "original": float(before.mean()),
        "pruned": float(after.mean()),
        "difference": difference,
        "test": "mcnemar-exact" if binary else "t",
        "only_original": only[0] if binary else None,
        "only_pruned": only[1] if binary else None,
        "left_out": left_out,
    }
    if identical:
        return Paired(**shape, error=0.0, freedom=np.inf, low=0.0, high=0.0, p=1.0)
    if count < 2:
        return Paired(**shape, error=None, freedom=0.0, low=None, high=None, p=None)
    if binary:
        return Paired(**shape, **_binary(count, *only))
    return Paired(**shape, **_continuous(after - before))


def _binary(count: int, lost: int, gained: int) -> dict[str, Any]:
    p_lost, p_gained = (lost + 0.5) / (count + 2), (gained + 0.5) / (count + 2)
    centre = p_gained - p_lost
    error = float(np.sqrt((p_lost + p_gained - centre**2) / (count + 2)))
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * error
    apart = lost + gained
    p = float(stats.binomtest(lost, apart).pvalue) if apart else 1.0
    low, high = max(centre - half, -1.0), min(centre + half, 1.0)
    return {"error": error, "freedom": np.inf, "low": low, "high": high, "p": p}


def _continuous(differences: npt.NDArray[np.float64]) -> dict[str, Any]:
    freedom, mean = len(differences) - 1, float(differences.mean())
    error = float(differences.std(ddof=1) / np.sqrt(len(differences)))
    found = {"error": error, "freedom": freedom, **_around(mean, error, freedom)}
    # All differ by the same: no error to hold the mean against, but few may agree by chance.
    return found | ({"p": 2.0**-freedom} if error == 0 and mean else {})


def _around(mean: float, error: float, freedom: float) -> dict[str, Any]:
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    if error == 0:
        return {"low": mean, "high": mean, "p": float(mean == 0)}
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return {"low": mean - half, "high": mean + half, "p": p}


def mean_of(tasks: Sequence[Paired]) -> Paired:
    """Several tasks' mean, each weighing the same; their items are independent.

    The error is √(Σ eᵢ²) / k, its degrees of freedom those of Welch and Satterthwaite.
    """
    errors = [task.error for task in tasks if task.error is not None]
    difference = float(np.mean([task.difference for task in tasks]))
    shape: dict[str, Any] = {
        "items": sum(task.items for task in tasks),
        "original": float(np.mean([task.original for task in tasks])),
        "pruned": float(np.mean([task.pruned for task in tasks])),
        "difference": difference,
        "test": "t",
        "only_original": _total([task.only_original for task in tasks]),
        "only_pruned": _total([task.only_pruned for task in tasks]),
        "left_out": sum(task.left_out for task in tasks),
    }
    if len(errors) < len(tasks):
        return Paired(**shape, error=None, freedom=0.0, low=None, high=None, p=None)
    squares = np.square(errors)
    spread = float(sum(s**2 / task.freedom for s, task in zip(squares, tasks, strict=True)))
    freedom = float(squares.sum() ** 2 / spread) if spread else np.inf
    error = float(np.sqrt(squares.sum())) / len(tasks)
    return Paired(**shape, error=error, freedom=freedom, **_around(difference, error, freedom))


def _total(counts: Sequence[int | None]) -> int | None:
    """``None`` where any is."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
