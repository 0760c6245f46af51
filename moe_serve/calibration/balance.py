"""How much each domain counts. A balance gives every domain its part of the weight; parts sum to 1.

Everything fitted or counted on calibration tokens weighs them by it: normal matrices, gradients,
re-fits, the choice of λ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from moe_serve.errors import UsageError

TASK: Final = "task:"
"""Begins the name of every domain that task texts form."""
TASK_WEIGHT: Final = 0.5
"""Of a task whose weight is not given."""


def for_task(domains: Sequence[str], weight: float) -> tuple[float, ...]:
    """The task's domains share ``weight`` evenly, the others the rest.

    Args:
        domains: all names; the task's begin with :data:`TASK`.
        weight: w in [0, 1]; 0 leaves the task aside, 1 everything else.

    Raises:
        UsageError: w is out of bounds, or there is nobody to take a part.
    """
    if not 0.0 <= weight <= 1.0:
        raise UsageError(
            f"is {weight:g}, not in [0, 1]",
            where="--task-weight",
            remedy="0 prunes for no task in particular, 1 for the task alone",
        )
    task = sum(name.startswith(TASK) for name in domains)
    others = len(domains) - task
    if weight < 1.0 and not others:
        raise UsageError(
            f"leaves {1 - weight:g} of the weight to texts that are not given",
            where="--task-weight",
            remedy="give --calibration PATH, or --task-weight 1",
        )
    return tuple(
        weight / task if name.startswith(TASK) else (1.0 - weight) / others for name in domains
    )


def quotas(balance: Sequence[float], tokens: Sequence[int], total: int) -> tuple[int, ...]:
    """Tokens of each domain in a sample of about ``total``, in proportion to the balance.

    Rounded down and bounded by what a domain has; the sum is the size of the sample. A domain of
    any weight gives one token at least.
    """
    return tuple(
        min(count, max(1, math.floor(part * total))) if part > 0.0 else 0
        for part, count in zip(balance, tokens, strict=True)
    )


def ordered(balance: Mapping[str, float], domains: Sequence[str]) -> tuple[float, ...]:
    """A recorded balance in the order of some texts' domains.

    Raises:
        UsageError: these are not the domains it was made for.
    """
    if set(balance) != set(domains):
        raise UsageError(
            f"hold the domains {', '.join(domains)}, "
            f"the plan weighs {', '.join(balance) or 'all alike'}",
            where="texts",
            remedy="give the --calibration and --task-texts that it was planned with",
        )
    return tuple(balance[name] for name in domains)
