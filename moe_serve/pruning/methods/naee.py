"""NAEE: the subset of experts whose layer output is nearest to the whole layer's.

Shape suffixes: S reservoir tokens, N experts, D hidden size.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch

from moe_serve.calibration.mixture import Mixture, Router
from moe_serve.pruning.methods.drops import checked_count, whole
from moe_serve.pruning.methods.groups import best_experts
from moe_serve.pruning.methods.view import Budget, LayerView
from moe_serve.pruning.plan import LayerPlan

_ENUMERATE: Final = 2000
"""At most this many subsets are all tried; the paper's Mixtral 8 → 4 has 70."""
_CHUNK: Final = 64


def drop_naee(view: LayerView, budget: Budget) -> LayerPlan:
    """Keep the subset of experts that reconstructs the layer's output best.

    Source: arXiv 2402.14800, eq. 5: all subsets are tried where that is feasible, by the Frobenius
    norm of the change over all tokens at once (its code adds the norms of its batches). Where it
    is not, experts go one by one, each time the one whose loss costs least, and are then swapped
    against dropped ones as long as that helps (the paper stops at eight experts).
    """
    count = checked_count(view, budget)
    search = _Search.of(view.mixture(), view.observed().reservoir_SD)
    rule, experts = search.logits_router.rule, range(view.shape.experts)
    if math.comb(len(experts), count) <= _ENUMERATE:
        subsets = itertools.combinations(experts, count)
        sound = (s for s in subsets if not rule.selection_defects(s, len(experts)))
        kept = min(sound, key=search.error, default=())
    else:
        kept = search.greedy(count)
    single = search.single()
    if rule.selection_defects(kept, len(experts)):
        # The router ranks groups, and these would leave it too little; each one's error decides.
        kept = tuple(best_experts(single, count, rule))
    return whole(view, sorted(kept), {"error_without": single})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """Layer output error of any subset, from the Gram matrix of all experts' outputs."""

    logits_router: Router
    z_SD: torch.Tensor
    weights_SN: torch.Tensor
    gram_SNN: torch.Tensor

    @classmethod
    def of(cls, mixture: Mixture, z_SD: torch.Tensor) -> _Search:
        grams = []
        for z_sD in z_SD.split(_CHUNK):
            f_sND = torch.stack(
                [mixture.hidden(u, z_sD) @ u.down_DF.T for u in mixture.units], dim=1
            )
            grams.append(f_sND @ f_sND.transpose(1, 2))
        return cls(
            logits_router=mixture.router,
            z_SD=z_SD,
            weights_SN=mixture.router(z_SD),
            gram_SNN=torch.cat(grams),
        )

    def error(self, kept: Iterable[int]) -> float:
        """Mean squared change of the layer's output when only ``kept`` can be selected."""
        dropped = sorted(set(range(self.gram_SNN.shape[1])) - set(kept))
        fewer = dataclasses.replace(self.logits_router, dropped=tuple(dropped))
        change_SN = fewer(self.z_SD) - self.weights_SN
        square_S = (torch.bmm(self.gram_SNN, change_SN[:, :, None])[:, :, 0] * change_SN).sum(1)
        return float(square_S.mean())

    def single(self) -> list[float]:
        """The error of dropping each expert alone."""
        every = range(self.gram_SNN.shape[1])
        return [self.error(e for e in every if e != gone) for gone in every]

    def greedy(self, count: int) -> tuple[int, ...]:
        """Backward elimination, then swaps while one helps."""
        kept = list(range(self.gram_SNN.shape[1]))
        while len(kept) > count:
            kept.remove(min(kept, key=lambda e: self.error(k for k in kept if k != e)))
        best = self.error(kept)
        improved = True
        while improved:
            improved = False
            for out in tuple(kept):
                spare = sorted(set(range(self.gram_SNN.shape[1])) - set(kept))
                trials = {new: self.error([k for k in kept if k != out] + [new]) for new in spare}
                new = min(trials, key=lambda e: trials[e], default=out)
                if new != out and trials[new] < best * (1 - 1e-6):
                    kept[kept.index(out)], best, improved = new, trials[new], True
        return tuple(kept)
