"""One expert count N' and one width I' for the whole model: what stock software loads.

Every pair the byte budget allows is estimated from the statistics of all layers; the most promising
are measured after compensation, and the best of those is taken. Which experts go may differ from
layer to layer, which neurons go from expert to expert.

Shape suffixes: S reservoir tokens, N experts, D hidden size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch

from moe_serve.calibration.mixture import Mixture, Router
from moe_serve.checkpoint.table import MAX_BLOCKS, WIDTH_MULTIPLE
from moe_serve.errors import PlanError
from moe_serve.families import Routing, Shape
from moe_serve.pruning.fitting.split import split_plan, steady_direction
from moe_serve.pruning.ground import Measured
from moe_serve.pruning.methods.neurons import Ladder, loss_root
from moe_serve.pruning.methods.view import LayerView
from moe_serve.pruning.numbers import tile_width
from moe_serve.pruning.plan import Block, LayerPlan, Part

SHORTLIST: Final = 4
"""Pairs measured. The estimates rank within a factor of two or so, and neighbours are close."""
_NEAR: Final = 0.1
"""Share of the KL that fewer, wider experts may cost: many narrow ones take more time."""
_MOST_EXPERTS: Final = 512
_MOST_SELECTED: Final = 32
"""Of stock models' largest: cuts beyond that would be the first of their kind."""
_CHUNK: Final = 64


class Size(NamedTuple):
    """What every layer of a stock model has the same of."""

    experts: int
    width: int
    top_k: int | None = None
    """Experts selected per token, where these are blocks of the original's."""


class Narrowed(NamedTuple):
    """One layer at one size, as far as the statistics see it."""

    kept: tuple[int, ...]
    dropped_error: float
    """What dropping the others costs in the loss's metric, the router choosing among the kept."""
    narrowed_error: float
    """What narrowing the kept costs, each making up for its own."""

    @property
    def error(self) -> float:
        """Both together."""
        return self.dropped_error + self.narrowed_error


class Cut(NamedTuple):
    """One layer cut into blocks of one size, each an expert to the router."""

    counts: tuple[int, ...]
    """Blocks of each original expert."""
    error: float
    """What the blocks that go cost, the others making up for it; the router's part is unknown."""


def feasible(shape: Shape, routing: Routing, keep: float, tile: int = 1) -> list[Size]:
    """Every pair that fits the budget and that no other such pair contains.

    A width is a multiple of 32 and of the number format's tile, or it is the original's: the CPU
    kernels pad to 32, so that less would save nothing there; Triton's mask the rest of a tile. The
    router must find top_k experts; where it selects among groups of experts, all groups stay and
    lose the same number.

    Raises:
        PlanError: there is none.
    """
    unit = math.lcm(WIDTH_MULTIPLE, tile)
    budget = int(keep * shape.experts * shape.width + 1e-9)
    widest: dict[int, int] = {}
    for width in sorted({*range(unit, shape.width, unit), shape.width}):
        count = min(shape.experts, budget // width) // routing.groups * routing.groups
        if count and not routing.defects(count):
            widest[count] = width
    if not widest:
        raise PlanError(
            f"{keep:.0%} of the bytes are too few for {shape.top_k} experts of {unit} neurons",
            remedy="keep more, or choose --format compact, which has no such limit",
            where="--keep",
        )
    return [Size(count, width) for count, width in sorted(widest.items())]


def cuts(shape: Shape, routing: Routing, keep: float, tile: int = 1) -> list[Size]:
    """Every way to cut the experts into equal blocks that are experts of their own.

    None where the router ranks groups, or where there would be more experts, or more of them
    selected, than fused routing kernels are made for.
    """
    unit = math.lcm(64 if shape.width >= 512 else WIDTH_MULTIPLE, tile)
    found = []
    for parts in range(2, MAX_BLOCKS + 1):
        count = int(keep * shape.experts * parts + 1e-9)
        top_k = routing.top_k * parts
        if (
            routing.groups == 1
            and shape.width % (parts * unit) == 0
            and top_k <= min(count, _MOST_SELECTED)
            and count <= _MOST_EXPERTS
        ):
            found.append(Size(count, shape.width // parts, top_k))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighed:
    """The sizes for a model: what each would cost, and the layers' choices."""

    ladders: Mapping[int, Ladder]
    options: Mapping[int, Mapping[Size, Narrowed | Cut]]
    directions: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """Where cuts are among the options: v of each layer, see ``fitting/split.py``."""

    def estimates(self) -> dict[Size, float]:
        """Summed error of all layers in the loss's metric, least first."""
        sizes = next(iter(self.options.values()))
        total = {size: sum(o[size].error for o in self.options.values()) for size in sizes}
        return dict(sorted(total.items(), key=lambda item: item[1]))

    def layers(self, size: Size) -> dict[int, LayerPlan]:
        """Every layer at a size."""
        return {index: self._layer(index, size) for index in self.options}

    def _layer(self, index: int, size: Size) -> LayerPlan:
        ladder, option = self.ladders[index], self.options[index][size]
        if isinstance(option, Narrowed):
            return narrowed_plan(ladder, size.width, option)
        top_k = size.top_k or size.experts
        return split_plan(ladder, size.width, option.counts, top_k, self.directions[index])

    def shortlist(self) -> list[Size]:
        """The best by estimate, of both kinds: their estimates do not compare."""
        sizes = list(self.estimates())
        cut = [size for size in sizes if size.top_k is not None]
        whole = [size for size in sizes if size.top_k is None]
        few = cut[: SHORTLIST - 1]
        return whole[: SHORTLIST - len(few)] + few


def weigh(
    views: Iterable[LayerView], method: Callable[[LayerView], Ladder], keep: float
) -> Weighed:
    """Estimate every feasible size on every layer. Peak memory: one layer, and N² · S numbers."""
    ladders: dict[int, Ladder] = {}
    options: dict[int, dict[Size, Narrowed | Cut]] = {}
    directions: dict[int, torch.Tensor] = {}
    for view in views:
        routing = view.checkpoint.family.routing_of(view.checkpoint.config)
        tile = tile_width(view.checkpoint)
        ladder = method(view)
        search = _Search.of(
            view.mixture(), view.observed().reservoir_SD, loss_root(view.gradients())
        )
        ladders[view.index] = ladder
        whole = feasible(view.shape, routing, keep, tile)
        options[view.index] = {
            size: search.keep(size.experts, ladder.path.error_at(size.width)) for size in whole
        } | {size: _cut(ladder, size) for size in cuts(view.shape, routing, keep, tile)}
        directions[view.index] = steady_direction(view.observed().reservoir_SD)
    return Weighed(ladders=ladders, options=options, directions=directions)


def _cut(ladder: Ladder, size: Size) -> Cut:
    """The layer's best blocks, wherever they lie."""
    curve = ladder.curve(size.width)
    return Cut(tuple(curve.counts(size.experts)), float(curve.error_K[size.experts]))


def choose(
    weighed: Weighed, measure: Callable[[str, dict[int, LayerPlan]], Measured] | None
) -> tuple[dict[int, LayerPlan], dict[str, Any]]:
    """The size that measures best, or, with nothing to measure on, is estimated to.

    Of those within a tenth of the best it is the one with the fewest experts.

    Returns:
        All layers at that size, and what was weighed, for the plan.
    """
    estimates = weighed.estimates()
    shortlist = weighed.shortlist()
    measured: dict[Size, Measured] = {}
    if measure is not None and len(shortlist) > 1:
        measured = {
            size: measure("-".join(map(str, size)), weighed.layers(size)) for size in shortlist
        }
        least = min(kl.mean for kl in measured.values())
        near = [size for size in shortlist if measured[size].mean <= (1 + _NEAR) * least]
        chosen = min(near, key=lambda size: (size.experts, measured[size].mean))
    else:
        chosen = shortlist[0]
    rows = [
        {
            "experts": size.experts,
            "width": size.width,
            "top_k": size.top_k,
            "estimated_error": estimates[size],
            "measured_kl": measured[size]._asdict() if size in measured else None,
        }
        for size in estimates
    ]
    return weighed.layers(chosen), {"size": chosen._asdict(), "weighed": rows}


def narrowed_plan(ladder: Ladder, width: int, option: Narrowed) -> LayerPlan:
    """A layer whose kept experts hold ``width`` neurons each; the router never selects the rest."""
    experts = len(ladder.path.order_NI)
    place = {expert: number for number, expert in enumerate(option.kept)}
    parts = [Part(expert=e, neurons=tuple(sorted(ladder.path.kept(e, width)))) for e in option.kept]
    why = {
        "neurons_kept": [width if e in place else 0 for e in range(experts)],
        "error_added": ladder.path.error_at(width).tolist(),
        "error_if_dropped": ladder.path.error_at(0).tolist(),
        "error_of_drops": option.dropped_error,
        "removal": ladder.removal(),
        "scores": ladder.scores,
    }
    return LayerPlan(
        width=width,
        blocks=tuple(Block(parts=(part,)) for part in parts),
        experts=tuple((place[e],) if e in place else None for e in range(experts)),
        why=why,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """What dropping experts does to the layer's output when the router chooses again."""

    router: Router
    z_SD: torch.Tensor
    weights_SN: torch.Tensor
    gram_SNN: torch.Tensor
    """Inner products of all experts' outputs in the loss's metric."""

    @classmethod
    def of(cls, mixture: Mixture, z_SD: torch.Tensor, root_DD: torch.Tensor) -> _Search:
        grams = []
        for z_sD in z_SD.split(_CHUNK):
            f_sND = torch.stack(
                [mixture.hidden(u, z_sD) @ u.down_DF.T @ root_DD for u in mixture.units], dim=1
            )
            grams.append(f_sND @ f_sND.transpose(1, 2))
        return cls(
            router=mixture.router,
            z_SD=z_SD,
            weights_SN=mixture.router(z_SD),
            gram_SNN=torch.cat(grams),
        )

    def keep(self, count: int, narrowed_N: torch.Tensor) -> Narrowed:
        """Let experts go one by one, each time the one that then costs least in all.

        Args:
            count: experts that stay.
            narrowed_N: what narrowing each expert costs; saved where it goes.
        """
        experts = len(narrowed_N)
        groups = self.router.rule.groups
        quota = [(experts - count) // groups] * groups
        dropped: list[int] = []
        error_S = torch.zeros(len(self.z_SD), dtype=torch.float64)
        weights_SN = self.weights_SN
        while len(dropped) < experts - count:
            candidates = [
                e for e in range(experts) if e not in dropped and quota[e * groups // experts]
            ]
            added = {e: self._added(dropped, e, weights_SN, error_S) for e in candidates}
            gone = min(candidates, key=lambda e: added[e] - float(narrowed_N[e]))
            quota[gone * groups // experts] -= 1
            dropped.append(gone)
            weights_SN = self._without(dropped)(self.z_SD)
            error_S = self._error(weights_SN - self.weights_SN, self.gram_SNN)
        kept = tuple(e for e in range(experts) if e not in dropped)
        return Narrowed(kept, float(error_S.mean()), float(narrowed_N[list(kept)].sum()))

    def _added(
        self, dropped: Sequence[int], more: int, weights_SN: torch.Tensor, error_S: torch.Tensor
    ) -> float:
        """Mean error that one more drop adds. Only tokens that select it now feel it."""
        felt = torch.nonzero(weights_SN[:, more]).squeeze(1)
        if not len(felt):
            return 0.0
        change_sN = self._without([*dropped, more])(self.z_SD[felt]) - self.weights_SN[felt]
        added_s = self._error(change_sN, self.gram_SNN[felt]) - error_S[felt]
        return float(added_s.sum()) / len(self.z_SD)

    def _without(self, dropped: Sequence[int]) -> Router:
        return dataclasses.replace(self.router, dropped=tuple(dropped))

    @staticmethod
    def _error(change_sN: torch.Tensor, gram_sNN: torch.Tensor) -> torch.Tensor:
        return (torch.bmm(gram_sNN, change_sN[:, :, None])[:, :, 0] * change_sN).sum(1).double()
