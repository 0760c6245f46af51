"""Methods that choose neurons, and blocks made of them.

A method of this kind gives one :class:`Ladder` per layer: the order in which each expert's neurons
can go and what the layer loses with each. How many blocks an expert keeps is decided afterwards,
over one layer or over the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from moe_serve.calibration.gradients import LayerGradients
from moe_serve.errors import PlanError
from moe_serve.pruning.methods.allocation import Curve, curve
from moe_serve.pruning.methods.obs import RemovalPath, removal_path
from moe_serve.pruning.methods.tiles import tile_path, tiles_by_value
from moe_serve.pruning.methods.view import LayerView
from moe_serve.pruning.plan import Block, LayerPlan, copies

_JITTER = 1e-4
"""Of the metric's mean diagonal: directions the loss never felt still count a little."""

_STEPS: Final = 24
"""Points at which a report draws what an expert's removal costs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """One layer's choices."""

    path: RemovalPath
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Per expert, for the plan's reasons."""

    def errors(self, block: int) -> npt.NDArray[np.float64]:
        """Error [N, R + 1] of each expert when it keeps 0 … R blocks of ``block`` neurons."""
        most = self.path.order_NI.shape[1] // block
        columns = [self.path.error_at(count * block) for count in range(most + 1)]
        found: npt.NDArray[np.float64] = torch.stack(columns, dim=1).numpy()
        return found

    def curve(self, block: int) -> Curve:
        """The layer's least error for every number of blocks."""
        return curve(self.errors(block))

    def removal(self) -> dict[str, list[Any]]:
        """Error of each expert [N, 25] as more and more of its cheapest neurons go, four digits."""
        width = self.path.order_NI.shape[1]
        gone = sorted({width * step // _STEPS for step in range(_STEPS + 1)})
        error_NG = torch.stack([self.path.error_at(width - count) for count in gone], dim=1)
        return {
            "removed": gone,
            "error": [[float(f"{e:.4g}") for e in r] for r in error_NG.tolist()],
        }

    def plan(self, block: int, counts: list[int]) -> LayerPlan:
        """The layer when expert e keeps ``counts[e]`` blocks."""
        blocks: list[Block] = []
        experts: list[tuple[int, ...]] = []
        for expert, count in enumerate(counts):
            new = copies(expert, self.path.kept(expert, count * block), block)
            experts.append(tuple(range(len(blocks), len(blocks) + len(new))))
            blocks += new
        error_NR = self.errors(block)
        chosen_N = error_NR[np.arange(len(counts)), counts]
        full_N = np.maximum(error_NR[:, 0], np.finfo(np.float64).tiny)
        why = {
            "neurons_kept": [count * block for count in counts],
            "error_added": chosen_N.tolist(),
            "error_if_dropped": error_NR[:, 0].tolist(),
            "share_of_output_lost": (chosen_N / full_N).tolist(),
            "removal": self.removal(),
            "scores": self.scores,
        }
        return LayerPlan(width=block, blocks=tuple(blocks), experts=tuple(experts), why=why)


def block_obs(view: LayerView) -> Ladder:
    """Order neurons by what their removal costs when the others make up for it.

    Optimal brain surgeon under re-fitting, with the error of the layer's output measured in the
    loss's metric M = E[g gᵀ], so that errors of different layers compare.

    Source: Hassibi & Stork 1993, eq. 5, with the output-error Hessian of arXiv 2301.00774, eq. 2;
    neurons as the unit, and the metric, after HEAPr, arXiv 2509.22299, eq. 12.
    """
    statistics = view.observed()
    root_DD, down_NDI = loss_root(view.gradients()), view.projection(2)
    normal_NII = statistics.normal_NII / statistics.weight
    path = (
        removal_path(normal_NII, down_NDI, root_DD=root_DD, device=view.device)
        if view.tile == 1
        else tile_path(normal_NII, down_NDI, view.tile, root_DD=root_DD, device=view.device)
    )
    scores = {
        "reap": statistics.reap().tolist(),
        "frequency": statistics.frequency().tolist(),
    }
    return Ladder(path=path, scores=scores)


def loss_root(gradients: LayerGradients) -> torch.Tensor:
    """R with R Rᵀ = M: tr(M ΔᵀΔ) is the plain squared error of Δ R. [D, D], FP32."""
    metric_DD = gradients.metric()
    metric_DD.diagonal().add_(_JITTER * metric_DD.diagonal().mean())
    root_DD: torch.Tensor = torch.linalg.cholesky(metric_DD)
    return root_DD.float()


def block_heapr(view: LayerView) -> Ladder:
    """Order neurons by HEAPr's importance, without re-fitting, as published.

    Source: arXiv 2509.22299, eq. 15: E[h²] · dᵀ M d, ranked over the whole model.
    """
    return _by_value(view.gradients().heapr(), view.tile)


def block_taylor(view: LayerView) -> Ladder:
    """Order neurons by first-order attribution E|h ∂L/∂h|, without re-fitting.

    Source: MoE-Slimming, arXiv 2606.18304: the loss's first-order change when the neuron goes.
    """
    gradients = view.gradients()
    return _by_value(gradients.taylor_NI.double() / gradients.weight, view.tile)


def block_magnitude(view: LayerView) -> Ladder:
    """Order neurons by the product of norms ‖g‖·‖u‖·‖d‖; needs no data.

    The product is invariant under the rescalings that leave a gated neuron's function unchanged
    up to its activation: up by a factor and down by its inverse.
    """
    gate_NID, up_NID, down_NDI = (view.projection(i) for i in range(3))
    product_NI = gate_NID.norm(dim=2) * up_NID.norm(dim=2) * down_NDI.norm(dim=1)
    return _by_value(product_NI.double().square(), view.tile)


def _by_value(value_NI: torch.Tensor, tile: int) -> Ladder:
    """Neurons (or tiles) of least value first; a sum is worth its parts."""
    if tile > 1:
        return Ladder(path=tiles_by_value(value_NI, tile))
    sorted_NI, order_NI = value_NI.sort(dim=1, stable=True)
    return Ladder(path=RemovalPath(order_NI=order_NI, error_NI=sorted_NI.cumsum(dim=1)))


def even_counts(total: int, experts: int, most: int) -> list[int]:
    """The same number of blocks for every expert of a layer, what stock software can load.

    Raises:
        PlanError: it is none.
    """
    each = min(total // experts, most)
    if each < 1:
        raise PlanError(
            f"one block for each of {experts} experts is more than the budget",
            remedy="keep more, use narrower blocks, or choose --format compact",
            where="--keep",
        )
    return [each] * experts
