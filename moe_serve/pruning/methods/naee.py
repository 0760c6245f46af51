"""NAEE: the subset of experts whose layer output is nearest to the whole layer's.

Shape suffixes: S reservoir tokens, N experts, D hidden size.
"""

from __future__ import annotations

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
_ROWS: Final = 2**14
"""Tokens that are routed anew at once."""
_SWAPPED: Final = 32
"""Of more experts none is swapped: tries grow with their number cubed, half a minute at 64."""


def drop_naee(view: LayerView, budget: Budget) -> LayerPlan:
    """Keep the subset of experts that reconstructs the layer's output best.

    Source: arXiv 2402.14800, eq. 5: all subsets are tried where that is feasible, by the Frobenius
    norm of the change over all tokens at once (its code adds the norms of its batches). Where it
    is not, experts go one by one, each time the one whose loss costs least, and up to 32 of them
    are then swapped against dropped ones as long as that helps (the paper stops at eight).
    """
    count = checked_count(view, budget)
    search = _Search.of(view.mixture(), view.observed().reservoir_SD)
    rule, experts = search.router.rule, range(view.shape.experts)
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
    """Layer output error of any subset, from the Gram matrix of all experts' outputs.

    A change of the weights has as many entries as selections before and after, so a token's error
    is a sum over their squares, whatever the number of experts.
    """

    router: Router
    logits_SN: torch.Tensor
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
            router=mixture.router,
            logits_SN=mixture.router.logits(z_SD),
            weights_SN=mixture.router(z_SD),
            gram_SNN=torch.cat(grams),
        )

    @property
    def experts(self) -> int:
        """N."""
        return self.gram_SNN.shape[1]

    def error(self, kept: Iterable[int]) -> float:
        """Mean squared change of the layer's output when only ``kept`` can be selected."""
        _, error_S = self._state(self._all_but(kept))
        return float(error_S.mean())

    def single(self) -> list[float]:
        """The error of dropping each expert alone."""
        found: list[float] = self._one_more(self._all_but(range(self.experts))).tolist()
        return found

    def greedy(self, count: int) -> tuple[int, ...]:
        """Backward elimination, then, of few experts, swaps while one helps."""
        gone_N = self._all_but(range(self.experts))
        for _ in range(self.experts - count):
            gone_N[int(self._one_more(gone_N).argmin())] = True
        kept = torch.nonzero(~gone_N).squeeze(1).tolist()
        best, improved = self.error(kept), self.experts <= _SWAPPED
        while improved:
            improved = False
            for out in tuple(kept):
                others = [k for k in kept if k != out]
                error_N = self._one_back(self._all_but(others), out)
                new = int(error_N.argmin())
                if float(error_N[new]) < best * (1 - 1e-6):
                    kept[kept.index(out)], best, improved = new, float(error_N[new]), True
        return tuple(kept)

    def _all_but(self, kept: Iterable[int]) -> torch.Tensor:
        gone_N = torch.ones(self.experts, dtype=torch.bool)
        gone_N[list(kept)] = False
        return gone_N

    def _one_more(self, gone_N: torch.Tensor) -> torch.Tensor:
        """The error [N] where one expert more is gone; infinite for those that are."""
        weights_SN, error_S = self._state(gone_N)
        felt_SN = self._feels(weights_SN, gone_N) & ~gone_N
        error_N = torch.full((self.experts,), torch.inf, dtype=torch.float64)
        error_N[~gone_N] = error_S.sum()
        for pair_P2 in torch.nonzero(felt_SN).split(_ROWS):
            token_P, expert_P = pair_P2.unbind(1)
            gone_PN = gone_N.expand(len(token_P), -1).clone()
            gone_PN[torch.arange(len(token_P)), expert_P] = True
            _, changed_P = self._state(gone_PN, token_P)
            error_N.index_add_(0, expert_P, changed_P - error_S[token_P])
        return error_N / len(self.logits_SN)

    def _feels(self, weights_SN: torch.Tensor, gone_N: torch.Tensor) -> torch.Tensor:
        """Which tokens' weights may change with each expert [S, N]."""
        rule = self.router.rule
        if rule.score == "softmax" and not rule.renormalise:
            return torch.ones_like(weights_SN, dtype=torch.bool)  # Everyone else's share grows.
        felt_SN = weights_SN > 0
        if rule.groups > 1:  # Those that a group is ranked by, too.
            _, choice_SN = self.router.scored(self.logits_SN, gone_N)
            grouped_SGn = choice_SN.view(len(choice_SN), rule.groups, -1)
            best_SGb = grouped_SGn.topk(rule.group_best, dim=-1).indices
            ranks_SGn = torch.zeros_like(grouped_SGn, dtype=torch.bool).scatter_(
                2, best_SGb, value=True
            )
            felt_SN = felt_SN | ranks_SGn.flatten(1)
        return felt_SN

    def _one_back(self, gone_N: torch.Tensor, out: int) -> torch.Tensor:
        """The error [N] where one of those gone, but ``out``, comes back; infinite for others."""
        error_N = torch.full((self.experts,), torch.inf, dtype=torch.float64)
        for new in torch.nonzero(gone_N).squeeze(1).tolist():
            if new != out:
                back_N = gone_N.clone()
                back_N[new] = False
                error_N[new] = self._state(back_N)[1].mean()
        return error_N

    def _state(
        self, gone: torch.Tensor, tokens: torch.Tensor | slice = slice(None)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [s, N] and squared error [s] (F64) of some tokens without the experts gone."""
        weights_sN = self.router.weigh(self.logits_SN[tokens], gone)
        change_sN = weights_sN - self.weights_SN[tokens]
        most = min(2 * self.router.rule.top_k, self.experts)
        index_sK = change_sN.abs().topk(most, dim=1).indices
        change_sK = change_sN.gather(1, index_sK)
        place_s = torch.arange(len(self.logits_SN))[tokens]
        gram_sKK = self.gram_SNN[place_s[:, None, None], index_sK[:, :, None], index_sK[:, None, :]]
        square_s = (torch.bmm(gram_sKK, change_sK[:, :, None])[:, :, 0] * change_sK).sum(dim=1)
        return weights_sN, square_s.double()
