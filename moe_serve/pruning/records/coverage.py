"""Which experts too few calibration tokens reached, and which kinds of text would reach them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from moe_serve.pruning.records.evidence import Evidence


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """An expert reached by fewer tokens than it has neurons.

    Below that its normal matrix has not full rank: some of its neurons look idle because nothing
    that they answer to was seen.
    """

    layer: int
    expert: int
    tokens: int
    """That selected it, of all domains."""
    domain: str | None
    """Whose tokens select it most often; ``None`` where none did."""
    more: int | None
    """Further tokens of that domain with which it would be reached often enough, about."""

    def to_json(self) -> dict[str, Any]:
        """As printed."""
        return asdict(self)


def gaps(evidence: Evidence) -> list[Gap]:
    """All of a model's, those that fewest tokens reached first."""
    found = []
    for layer, seen in evidence.layers.items():
        for expert in range(evidence.experts):
            counts = {
                name: row[expert]
                for name, row in zip(evidence.domains, seen.tokens_CN, strict=True)
            }
            tokens = sum(counts.values())
            if tokens >= evidence.width:
                continue
            rates = {name: count / max(evidence.tokens[name], 1) for name, count in counts.items()}
            domain = max(rates, key=lambda name: rates[name])
            missing = evidence.width - tokens
            found.append(
                Gap(
                    layer=layer,
                    expert=expert,
                    tokens=tokens,
                    domain=domain if tokens else None,
                    more=math.ceil(missing / rates[domain]) if tokens else None,
                )
            )
    return sorted(found, key=lambda gap: (gap.tokens, gap.layer, gap.expert))
