"""How many blocks each expert keeps when a layer may store K: exact, by dynamic programming."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moe_serve.errors import PlanError


def allocate(error_NR: npt.NDArray[np.float64], total: int) -> list[int]:
    """Minimise the summed error over experts under a total of blocks.

    Args:
        error_NR: error of expert e when it keeps r blocks, r = 0 … R.
        total: K, blocks to hand out, all of them.

    Returns:
        Blocks per expert, summing to ``total``.

    Raises:
        PlanError: there are fewer than ``total`` places.
    """
    experts, choices = error_NR.shape
    most = experts * (choices - 1)
    if not 0 <= total <= most:
        raise PlanError(f"{total} blocks do not fit {experts} experts of {choices - 1} each")
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    taken = np.zeros((experts, total + 1), dtype=np.int16)
    for expert in range(experts):
        candidates = np.full((choices, total + 1), np.inf)
        for count in range(min(choices - 1, total) + 1):
            candidates[count, count:] = best[: total + 1 - count] + error_NR[expert, count]
        taken[expert] = candidates.argmin(axis=0)
        best = candidates.min(axis=0)
    counts, left = [], total
    for expert in reversed(range(experts)):
        counts.append(int(taken[expert, left]))
        left -= counts[-1]
    return counts[::-1]
