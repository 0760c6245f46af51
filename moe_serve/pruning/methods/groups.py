"""Which experts stay where the router ranks groups of them before it selects."""

from __future__ import annotations

from collections.abc import Sequence

from moe_serve.errors import PlanError
from moe_serve.families import Routing


def best_experts(saliency: Sequence[float], count: int, rule: Routing) -> list[int]:
    """At most ``count`` experts of the highest summed saliency that leave the router sound.

    Without groups these are the highest; ties go to the lower id. With groups, each keeps none or
    :attr:`Routing.group_least` at least: the best such split by dynamic programming over groups.
    Where no split has ``count`` experts the largest below is taken: one more would be stored and
    never selected.

    Args:
        saliency: of each of the N experts.
        count: how many may stay.
        rule: how the router selects.

    Returns:
        Their ids, ascending.

    Raises:
        PlanError: no such choice exists.
    """
    experts = range(len(saliency))
    order = sorted(experts, key=lambda e: (-saliency[e], e))
    if not rule.selection_defects(order[:count], len(saliency)):
        return sorted(order[:count])
    size = len(saliency) // rule.groups
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for group in range(rule.groups):
        members = [e for e in order if e // size == group]
        longer: dict[int, tuple[float, list[int]]] = {}
        for used, (value, chosen) in best.items():
            for n in (0, *range(rule.group_least, min(size, count - used) + 1)):
                total = value + sum(saliency[e] for e in members[:n])
                if used + n not in longer or total > longer[used + n][0]:
                    longer[used + n] = (total, chosen + members[:n])
        best = longer
    found = [(used, *option) for used, option in best.items() if used >= rule.top_k]
    if not found:
        least = max(rule.top_k, -(-rule.top_k // size) * rule.group_least)
        raise PlanError(
            f"{count} experts are too few for a router that selects {rule.groups_selected} groups "
            f"of {size}, and {rule.top_k} experts among them",
            remedy=f"keep at least {least}, or choose a block method, which has no such limit",
            where="--keep, --experts",
        )
    return sorted(max(found)[2])
