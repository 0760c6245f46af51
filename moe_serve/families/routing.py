"""How a family turns router logits into weights: the rule, and the rule with a config's values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Score = Literal["softmax", "sigmoid"]
GroupScore = Literal["best", "best-two"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The rule for one checkpoint.

    Logits become scores; a correction bias, where there is one, is added for selection only;
    groups of consecutive experts are narrowed down first where there are several; the k best are
    selected, their scores optionally scaled to sum to one, then multiplied by ``scale``.
    """

    top_k: int
    score: Score = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_selected: int = 1
    group_score: GroupScore = "best"

    @property
    def group_best(self) -> int:
        """Experts whose scores a group is ranked by."""
        return 1 if self.group_score == "best" else 2

    def defects(self, experts: int) -> list[str]:
        """What keeps the rule from selecting among so many experts, in words."""
        if self.top_k > experts:
            return [f"{self.top_k} experts are selected per token, of {experts} experts"]
        if self.groups == 1:
            return []
        if experts % self.groups:
            return [f"n_group={self.groups} does not divide {experts} experts"]
        size = experts // self.groups
        found = []
        if self.groups_selected > self.groups:
            found.append(f"topk_group={self.groups_selected} of n_group={self.groups} groups")
        if self.top_k > self.groups_selected * size:
            found.append(
                f"{self.top_k} experts are selected per token, the {self.groups_selected} groups "
                f"selected hold {self.groups_selected * size} experts"
            )
        if size < self.group_best:
            found.append(f"groups of {size} hold fewer than the two that rank a group")
        return found

    @property
    def group_least(self) -> int:
        """Experts that a group keeps if it keeps any.

        With so many none is out of reach, and whichever groups are selected hold ``top_k``.
        """
        return max(self.group_best, -(-self.top_k // self.groups_selected))

    def selection_defects(self, kept: Collection[int], experts: int) -> list[str]:
        """What is wrong with a router that may only select the experts ``kept``, in words.

        A group in which fewer experts are left than rank a group is never selected.
        """
        if len(kept) < self.top_k:
            return [f"fewer than top_k={self.top_k} experts can be selected"]
        if self.groups == 1:
            return []
        size = experts // self.groups
        counts = Counter(expert // size for expert in kept)
        stranded = sorted(g for g, count in counts.items() if count < self.group_best)
        usable = sorted(count for count in counts.values() if count >= self.group_best)
        found = [f"group {g} keeps too few experts to be ever selected" for g in stranded[:1]]
        if sum(usable[: self.groups_selected]) < self.top_k:
            found.append(f"some {self.groups_selected} groups hold fewer than {self.top_k} experts")
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRule:
    """What a family fixes, and which config keys fill in the rest."""

    score: Score = "softmax"
    renormalise: bool | str = False
    """Fixed, or a config key."""
    scale_key: str | None = None
    group_score: GroupScore | None = None
    """``None``: the family knows no groups. Keys are ``n_group`` and ``topk_group``."""
    grouped_only_if: tuple[str, str] | None = None
    """Config key and the value it must have for groups to be in use."""

    def fill(self, config: Mapping[str, Any], top_k: int) -> Routing:
        """The rule with this config's values."""
        renormalise = self.renormalise
        if isinstance(renormalise, str):
            renormalise = bool(config.get(renormalise, False))
        grouped = self.group_score is not None and (
            self.grouped_only_if is None
            or config.get(self.grouped_only_if[0]) == self.grouped_only_if[1]
        )
        scale = config.get(self.scale_key) if self.scale_key else None
        return Routing(
            top_k=top_k,
            score=self.score,
            renormalise=renormalise,
            scale=float(scale) if scale is not None else 1.0,
            groups=int(config.get("n_group") or 1) if grouped else 1,
            groups_selected=int(config.get("topk_group") or 1) if grouped else 1,
            group_score=self.group_score or "best",
        )
