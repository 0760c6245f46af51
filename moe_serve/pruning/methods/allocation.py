"""How many blocks each expert and each layer keeps: exact, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_serve.errors import PlanError

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """One layer: the least summed error for every total of blocks."""

    error_K: _Array
    """Error when the layer stores k blocks, k = 0 … all of them."""
    taken_NK: npt.NDArray[np.int16]
    """Blocks of expert e in the best way to hand out k among experts 0 … e."""

    def counts(self, total: int) -> list[int]:
        """Blocks per expert, summing to ``total``."""
        counts, left = [], total
        for taken_K in self.taken_NK[::-1]:
            counts.append(int(taken_K[left]))
            left -= counts[-1]
        return counts[::-1]


def curve(error_NR: _Array) -> Curve:
    """Hand out blocks within a layer so that the summed error is least, for every total.

    Args:
        error_NR: error of expert e when it keeps r blocks, r = 0 … R.

    Cost: N R · N R additions.
    """
    experts, choices = error_NR.shape
    most = experts * (choices - 1)
    best_K = np.full(most + 1, np.inf)
    best_K[0] = 0.0
    taken_NK = np.zeros((experts, most + 1), dtype=np.int16)
    for expert, error_R in enumerate(error_NR):
        best_K, taken_NK[expert] = _add(best_K, error_R)
    return Curve(best_K, taken_NK)


def allocate(error_NR: _Array, total: int) -> list[int]:
    """Blocks per expert of one layer, summing to ``total``, with the least summed error.

    Raises:
        PlanError: there are fewer than ``total`` places.
    """
    experts, choices = error_NR.shape
    if not 0 <= total <= experts * (choices - 1):
        raise PlanError(
            f"{total} blocks do not fit {experts} experts of {choices - 1} each",
            where="--keep",
            remedy="keep less, or use narrower blocks with --block-width",
        )
    return curve(error_NR).counts(total)


def distribute(curves: Sequence[_Array], total: int, least: int = 1) -> list[int]:
    """Blocks per layer, summing to ``total``, with the least summed error.

    Args:
        curves: each layer's error for every number of blocks, 0 … all of them.
        total: blocks to hand out, all of them.
        least: blocks that every layer keeps.

    Raises:
        PlanError: ``total`` is less than every layer's least, or more than there are.
    """
    most = sum(len(error_K) - 1 for error_K in curves)
    if not least * len(curves) <= total <= most:
        raise PlanError(
            f"{total} blocks can't be spread over {len(curves)} layers with room for {most}, "
            f"at least {least} in each",
            remedy="keep more, or use narrower blocks with --block-width",
            where="--keep",
        )
    best_K = np.full(total + 1, np.inf)
    best_K[0] = 0.0
    taken = []
    for error_K in curves:
        allowed_K = error_K[: total + 1].copy()
        allowed_K[:least] = np.inf
        best_K, taken_K = _add(best_K, allowed_K)
        taken.append(taken_K)
    counts, left = [], total
    for taken_K in reversed(taken):
        counts.append(int(taken_K[left]))
        left -= counts[-1]
    return counts[::-1]


def _add(best_K: _Array, error_R: _Array) -> tuple[_Array, npt.NDArray[np.int32]]:
    """The least of ``best[k - r] + error[r]`` over r, and that r, for every k."""
    result_K = np.full_like(best_K, np.inf)
    taken_K = np.zeros(len(best_K), dtype=np.int32)
    for count, error in enumerate(error_R):
        if not np.isfinite(error):
            continue
        candidate = best_K[: len(best_K) - count] + error
        better = candidate < result_K[count:]
        result_K[count:][better] = candidate[better]
        taken_K[count:][better] = count
    return result_K, taken_K
