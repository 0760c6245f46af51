"""Groups of experts that become one stored expert each.

Shape suffixes: N experts, I neurons, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moe_serve.calibration.mixture import Mixture, Unit
from moe_serve.errors import PlanError
from moe_serve.families import Routing
from moe_serve.pruning.methods.alignment import Alignment
from moe_serve.pruning.methods.coefficients import COEFFICIENTS, Coefficients, Evidence
from moe_serve.pruning.methods.drops import checked_count
from moe_serve.pruning.methods.reservoir import Reservoir
from moe_serve.pruning.methods.view import Budget, LayerView
from moe_serve.pruning.plan import Block, LayerPlan, Part


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a method merges the groups it has found, unless the user says otherwise."""

    align: Alignment
    coefficients: str
    """Key of :data:`COEFFICIENTS`."""
    anchor: Literal["first", "heaviest"] = "heaviest"
    """Whose order the neurons take: the group's first member's, or the one's that counts most."""
    owners: Literal["members", "anchor"] = "members"
    """Who is selected for the merged expert: all members, their weights adding up, or the anchor
    alone, the others' router rows going like those of dropped experts."""
    drop_when_better: bool = False
    """Whether a group is reduced to its most salient member where that leaves the layer's output
    on held-out tokens closer to the original's and the router sound."""

    def may_drop(self, budget: Budget) -> bool:
        """Whether the router may be left with fewer experts to select from."""
        return self.owners == "anchor" or self.judges(budget)

    def judges(self, budget: Budget) -> bool:
        """Whether merges compete with drops."""
        wish = budget.drop_when_better
        return self.drop_when_better if wish is None else wish


def group_count(view: LayerView, budget: Budget, recipe: Recipe) -> int:
    """Groups a layer may have.

    Raises:
        PlanError: none, or fewer than the router selects where some may be dropped.
    """
    if recipe.may_drop(budget):
        return checked_count(view, budget)
    count = min(budget.whole_experts(view.shape), view.shape.experts)
    if count < 1:
        raise PlanError("no expert would stay in a layer", remedy="keep more", where="--keep")
    return count


def merge_groups(
    view: LayerView,
    budget: Budget,
    recipe: Recipe,
    groups: Sequence[Sequence[int]],
    *,
    mixture: Mixture,
    seen: Reservoir | None,
    why: dict[str, Any],
) -> LayerPlan:
    """Merge every group by the recipe.

    Args:
        view: the layer.
        budget: carries the user's wishes.
        recipe: the method's way.
        groups: a partition of the layer's experts.
        mixture: the layer's weights.
        seen: all experts on the same tokens, where the method has run them.
        why: the method's reasons; groups, scores and counts are added.
    """
    judges = recipe.judges(budget)
    statistics = view.statistics
    if seen is None and (judges or budget.coefficients == "qp"):
        seen = Reservoir.of(mixture, view.observed().reservoir_SD)
    fitting = seen.fitting() if seen is not None and judges else seen
    workshop = _Workshop(
        mixture=mixture,
        recipe=recipe,
        rule=COEFFICIENTS[budget.coefficients or recipe.coefficients],
        evidence=Evidence(statistics=statistics, reservoir=fitting),
        saliency_N=statistics.reap() if statistics is not None else None,
        judge=seen.held_out() if seen is not None and judges else None,
        routing=view.checkpoint.family.routing_of(view.checkpoint.config),
    )
    blocks: list[Block] = []
    experts: list[tuple[int, ...] | None] = [None] * view.shape.experts
    decisions = []
    gone: frozenset[int] = frozenset()
    for group in groups:
        block, owners, decision = workshop.work(group, gone)
        gone |= set(group) - set(owners)
        decisions += [decision] if decision else []
        for expert in owners:
            experts[expert] = (len(blocks),)
        blocks.append(block)
    reasons = {
        "neurons_kept": [0 if b is None else view.shape.width for b in experts],
        "groups": decisions,
        "scores": _scores(view),
    }
    return LayerPlan(
        width=view.shape.width, blocks=tuple(blocks), experts=tuple(experts), why=why | reasons
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Workshop:
    """Merges one group after the other."""

    mixture: Mixture
    recipe: Recipe
    rule: Coefficients
    evidence: Evidence
    saliency_N: torch.Tensor | None
    judge: Reservoir | None
    """Tokens on which a merge competes with a drop; ``None`` where it does not."""
    routing: Routing

    def work(
        self, group: Sequence[int], gone: frozenset[int]
    ) -> tuple[Block, list[int], dict[str, Any]]:
        """(stored block, who is selected for it, why); no reason where nothing was to be chosen.

        Args:
            group: its members.
            gone: experts that can't be selected because of groups before it.
        """
        members = sorted(group)
        best = self._most_salient(group)
        alone = Block(parts=(Part(expert=best, neurons=tuple(range(self._width(best)))),))
        if len(group) == 1:
            return alone, members, {}
        shares = dict(zip(members, self.rule(members, self.evidence).tolist(), strict=True))
        anchor = max(members, key=lambda e: (shares[e], -e))
        if self.recipe.anchor == "first":
            anchor = group[0]
        merged = merged_block(
            self.mixture, self.evidence.reservoir, self.recipe.align, anchor, shares
        )
        owners = members if self.recipe.owners == "members" else [anchor]
        decision = {"members": members, "kept": best, "shares": list(shares.values())}
        if self.judge is None:
            return merged, owners, decision | {"chosen": "merge"}
        unit = merged_unit(self.mixture, merged, tuple(owners))
        others = [e for e in members if e != best]
        error = {
            "merge": self.judge.error(
                dropped=[e for e in members if e not in owners],
                replaced=dict.fromkeys(owners, unit),
            ),
            "drop": self.judge.error(dropped=others, replaced={}),
        }
        if error["merge"] < error["drop"] or not self._sound(gone.union(others)):
            return merged, owners, decision | {"chosen": "merge", "error": error}
        return alone, [best], decision | {"chosen": "drop", "error": error}

    def _sound(self, gone: frozenset[int]) -> bool:
        """Whether the router still selects as it should without these experts."""
        experts = len(self.mixture.units)
        kept = [e for e in range(experts) if e not in gone]
        return not self.routing.selection_defects(kept, experts)

    def _width(self, expert: int) -> int:
        return self.mixture.units[expert].width

    def _most_salient(self, group: Sequence[int]) -> int:
        """By REAP where there are statistics; else the first."""
        saliency_N = self.saliency_N
        if saliency_N is None:
            return group[0]
        return max(group, key=lambda e: (float(saliency_N[e]), -e))


def _scores(view: LayerView) -> dict[str, list[float]]:
    if view.statistics is None:
        return {}
    return {
        "reap": view.statistics.reap().tolist(),
        "frequency": view.statistics.frequency().tolist(),
    }


def merged_block(
    mixture: Mixture,
    seen: Reservoir | None,
    align: Alignment,
    anchor: int,
    shares: dict[int, float],
) -> Block:
    """A block that averages a group's experts, neurons in the anchor's order.

    Args:
        mixture: the layer's weights.
        seen: tokens for alignments that use activations.
        align: finds the order.
        anchor: a member.
        shares: member → coefficient; those of zero are left out.
    """
    tokens = seen.z_SD if seen is not None else None
    parts = []
    for expert, share in shares.items():
        if share > 0:
            order = (
                list(range(mixture.units[expert].width))
                if expert == anchor
                else align(mixture, tokens, anchor, expert)
            )
            parts.append(Part(expert=expert, neurons=tuple(order), coefficient=share))
    return Block(parts=tuple(parts))


def merged_unit(mixture: Mixture, block: Block, owners: tuple[int, ...]) -> Unit:
    """The weights a block describes, from units that are whole experts, FP32."""
    gate, up, down = (
        sum_parts(block, [tensor(u) for u in mixture.units], rows=rows)
        for tensor, rows in (
            (lambda u: u.gate_FD, True),
            (lambda u: u.up_FD, True),
            (lambda u: u.down_DF, False),
        )
    )
    return Unit(owners=owners, gate_FD=gate, up_FD=up, down_DF=down)


def sum_parts(block: Block, weights: list[torch.Tensor], *, rows: bool) -> torch.Tensor:
    """Σ coefficient · weight[neurons]; a single part with coefficient one is an exact copy.

    Args:
        block: which neurons of which experts.
        weights: one matrix per original expert.
        rows: whether neurons are rows (gate, up) or columns (down).
    """
    total: torch.Tensor | None = None
    for part in block.parts:
        whole = weights[part.expert]
        index = torch.tensor(part.neurons, device=whole.device)
        taken = whole.index_select(0 if rows else 1, index)
        if part.coefficient != 1.0:
            taken = taken * part.coefficient
        total = taken if total is None else total + taken
    if total is None:
        raise ValueError("a block has at least one part")
    return total
