"""What two engines' lists of log-probabilities say of each other.

For every token of a text an engine gives the log-probabilities of the tokens that it thinks
likeliest at that place (``prompt_logprobs``, up to ``top`` of them). From two such lists follows a
**lower bound of KL(original ‖ pruned)** in nats. With p, q the two distributions, S the tokens that
both list, T those that only the original lists, e the smallest probability that pruned lists among
its ``top``: Σ_S p·log(p/q) + Σ_T p·log(p/e) + p_rest·log(p_rest/(1 - Σ_S q)),
p_rest = 1 - Σ_S p - Σ_T p. It is a bound because an unlisted token has at most e, and the rest of
q at most 1 - Σ_S q. Where both lists cover nearly everything it is the divergence itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Place:
    """What an engine expects at one place of a text."""

    listed: Mapping[int, float]
    """Token → log-probability: the ``top`` likeliest, and the token that stands there."""
    least: float
    """Smallest of the ``top``: no token that is not listed has more."""
    first: int
    """The likeliest token."""

    @property
    def sound(self) -> bool:
        """Whether all are numbers."""
        return all(math.isfinite(value) for value in self.listed.values())

    def complete(self, top: int) -> bool:
        """Whether ``top`` tokens are listed, or all there are.

        Of fewer the least says nothing of those that are not listed.
        """
        return len(self.listed) >= top or math.fsum(map(math.exp, self.listed.values())) > 0.999

    @classmethod
    def of(cls, entry: Mapping[str, Mapping[str, Any]], top: int) -> Place:
        """From vLLM's token → {logprob, rank}; what is no number becomes NaN."""
        values = {int(token): _number(found["logprob"]) for token, found in entry.items()}
        ranked = sorted(values.values(), reverse=True)[:top]
        return cls(values, ranked[-1], max(values, key=lambda token: values[token]))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def divergence(p: Place, q: Place, bound: float) -> float:
    """The bound of KL(p ‖ q) at one place, as above, clipped to [0, ``bound``]."""
    if not (p.sound and q.sound):
        return bound
    total, listed, shared = 0.0, 0.0, 0.0
    for token, value in p.listed.items():
        mass = math.exp(value)
        listed += mass
        other = q.listed.get(token)
        total += mass * (value - (q.least if other is None else other))
        shared += 0.0 if other is None else math.exp(other)
    if (rest := 1.0 - listed) > 1e-9:
        total += rest * math.log(rest / max(1.0 - shared, 1e-12))
    return min(max(total, 0.0), bound)
