"""What the loss feels of one layer's experts. All sums, so shards and machines add up.

With g the gradient of a sequence's summed negative log-likelihood at the mixture's output y, a
small change Δ of y changes the likelihood by gᵀΔ, and E[(gᵀΔ)²] = tr(M ΔᵀΔ) with M = E[g gᵀ], the
empirical Fisher matrix, is twice the divergence it causes: the metric in which errors of different
layers can be compared.

Shape suffixes: T tokens, D hidden size, N experts, I neurons per expert, R sketch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final, Literal

import numpy as np
import torch

from moe_serve.calibration.mixture import Mixture, Unit
from moe_serve.checkpoint.finite import all_finite
from moe_serve.errors import CalibrationError

SKETCH: Final = 64
"""R, rows of the sketch."""
GRADIENT_TOKENS: Final = 16_384
"""Tokens that take part, spread over the domains, where each neuron's sum counts."""
METRIC_TOKENS: Final = 4_096
"""Where only the metric does: with 2,048 of 57,344 tokens three small models came out as good as
with 16,384 (KL within 2 % at two sizes each), while rules that rank neurons by their own sums lost
a fifth."""

Felt = Literal["nothing", "metric", "neurons"]
"""What is asked of the reverse pass."""


def tokens_felt(felt: Felt, hidden: int) -> int:
    """Tokens of which the reverse pass is taken at most; the metric [D, D] wants twice its rank."""
    if felt == "nothing":
        return 0
    return GRADIENT_TOKENS if felt == "neurons" else max(METRIC_TOKENS, 2 * hidden)


def sketch(hidden: int) -> torch.Tensor:
    """Random signs [R, D] scaled by R^-½; the identity where D ≤ R. The same for every run.

    Source: Achlioptas 2003, theorem 1.1: distances survive such a projection.
    """
    if hidden <= SKETCH:
        return torch.eye(hidden)
    signs = np.random.default_rng(0).integers(0, 2, size=(SKETCH, hidden), dtype=np.int8)
    rows_RD: torch.Tensor = torch.from_numpy(2.0 * signs - 1.0).float()
    return rows_RD / math.sqrt(SKETCH)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGradients:
    """One layer's sums over tokens, each times its domain weight ω; w is the router's weight."""

    weight: torch.Tensor
    """Σ ω over all tokens [1] (F64)."""
    metric_DD: torch.Tensor
    """Σ ω g gᵀ (F32)."""
    reached_N: torch.Tensor
    """Σ ω over tokens that selected the expert (F64)."""
    taylor_N: torch.Tensor
    """Σ ω |w g·f(x)| (F64)."""
    fisher_N: torch.Tensor
    """Σ ω (w g·f(x))² (F64)."""
    activation_NI: torch.Tensor
    """Σ ω h² (F32)."""
    slope_NI: torch.Tensor
    """Σ ω (w g·d)², d the neuron's column of the down projection (F32)."""
    taylor_NI: torch.Tensor
    """Σ ω |w h g·d| (F32)."""
    fisher_NI: torch.Tensor
    """Σ ω (w h g·d)² (F32)."""
    map_NRR: torch.Tensor
    """A sketch of Σ ω w g zᵀ, the loss's gradient with respect to the expert as a map from input z
    to output: S (Σ ω w g zᵀ) Sᵀ, S the signs of :func:`sketch` (F32). Linear, so it adds up, and
    inner products of experts' gradients survive it to about 1/R."""

    @staticmethod
    def shapes(*, experts: int, width: int, hidden: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → (safetensors type, shape) of every field."""
        neurons = ("F32", (experts, width))
        return {
            "weight": ("F64", (1,)),
            "metric_DD": ("F32", (hidden, hidden)),
            "reached_N": ("F64", (experts,)),
            "taylor_N": ("F64", (experts,)),
            "fisher_N": ("F64", (experts,)),
            "activation_NI": neurons,
            "slope_NI": neurons,
            "taylor_NI": neurons,
            "fisher_NI": neurons,
            "map_NRR": ("F32", (experts, min(hidden, SKETCH), min(hidden, SKETCH))),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Field name → tensor."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def metric(self) -> torch.Tensor:
        """M = E[g gᵀ], [D, D] in FP64."""
        return self.metric_DD.double() / self.weight

    def heapr(self) -> torch.Tensor:
        """HEAPr's importance [N, I]: E[h²] · dᵀ E[(w g)(w g)ᵀ] d over tokens of the expert.

        Source: arXiv 2509.22299, eq. 15. Zero for an expert that no token reached.
        """
        reached_N1 = self.reached_N[:, None].clamp(min=torch.finfo(torch.float64).tiny)
        # Divided twice: the square of so small a number is zero.
        return (self.activation_NI.double() / reached_N1) * (self.slope_NI.double() / reached_N1)


class GradientSums:
    """Builds one layer's sums batch by batch. Memory: D² + 4 N I + N R² numbers, a batch."""

    def __init__(self, *, experts: int, width: int, hidden: int) -> None:
        """Start at zero."""
        self._sketch_RD = sketch(hidden)
        kinds = {"F32": torch.float32, "F64": torch.float64}
        shapes = LayerGradients.shapes(experts=experts, width=width, hidden=hidden)
        self._sums = {
            name: torch.zeros(shape, dtype=kinds[kind]) for name, (kind, shape) in shapes.items()
        }

    @torch.no_grad()
    def observe(
        self, mixture: Mixture, z_TD: torch.Tensor, g_TD: torch.Tensor, omega_T: torch.Tensor
    ) -> torch.Tensor:
        """Add a batch; return the loss's gradient at the mixture's inputs [T, D].

        The chain rule is written out for the experts, because the sums want its intermediate
        results: five matrix products per expert instead of the nine of a forward, a backward by
        autograd, and a forward again for the sums.

        Args:
            mixture: an untouched layer: unit e is expert e.
            z_TD: the mixture's inputs.
            g_TD: the loss's gradient at its outputs.
            omega_T: each token's weight.

        Raises:
            CalibrationError: the gradients are not finite.
        """
        if not all_finite(g_TD):
            raise CalibrationError(
                "gradients hold NaN or infinite values",
                remedy="weights are damaged, or the model overflows: compare the files' SHA-256 "
                "with the source",
            )
        self._sums["weight"] += omega_T.double().sum().cpu()
        self._sums["metric_DD"] += ((g_TD * omega_T[:, None]).T @ g_TD).cpu()
        sketch_DR = self._sketch_RD.T.to(z_TD.device)
        z_TR, g_TR = z_TD @ sketch_DR, g_TD @ sketch_DR
        with torch.enable_grad():
            input_TD = z_TD.detach().requires_grad_()
            weights_TN = mixture.router(input_TD)
            always_TD = mixture.always(input_TD)
        dweights_TN, dz_TD = torch.zeros_like(weights_TN), torch.zeros_like(z_TD)
        for unit in mixture.units:
            (expert,) = unit.owners
            index = torch.nonzero(weights_TN[:, expert]).squeeze(1)
            if len(index):
                weight_t1 = weights_TN[index, expert, None]
                share_t1 = weight_t1 * omega_T[index, None]
                self._sums["map_NRR"][expert] += ((g_TR[index] * share_t1).T @ z_TR[index]).cpu()
                slope_tI = g_TD[index] @ unit.down_DF
                h_tI, dz_tD = _neurons(mixture, unit, z_TD[index], slope_tI * weight_t1)
                dweights_TN[index, expert] = (h_tI * slope_tI).sum(dim=1)
                dz_TD.index_add_(0, index, dz_tD)
                self._add(expert, omega_T[index], h_tI, slope_tI * weight_t1)
        outputs, heads = [weights_TN], [dweights_TN]
        if mixture.shared is not None:
            outputs.append(always_TD)
            heads.append(g_TD)
        (rest_TD,) = torch.autograd.grad(outputs, input_TD, heads)
        return dz_TD + rest_TD

    def _add(
        self, expert: int, omega_t: torch.Tensor, h_tI: torch.Tensor, slope_tI: torch.Tensor
    ) -> None:
        """Add the tokens of one expert; slopes come with the router's weight."""
        sums, effect_tI = self._sums, h_tI * slope_tI
        effect_t = effect_tI.sum(dim=1)
        sums["reached_N"][expert] += omega_t.double().sum().cpu()
        sums["taylor_N"][expert] += (omega_t @ effect_t.abs()).double().cpu()
        sums["fisher_N"][expert] += (omega_t @ effect_t.square()).double().cpu()
        sums["activation_NI"][expert] += (omega_t @ h_tI.square()).cpu()
        sums["slope_NI"][expert] += (omega_t @ slope_tI.square()).cpu()
        sums["taylor_NI"][expert] += (omega_t @ effect_tI.abs()).cpu()
        sums["fisher_NI"][expert] += (omega_t @ effect_tI.square()).cpu()

    def result(self) -> LayerGradients:
        """The sums of everything observed."""
        return LayerGradients(**self._sums)


def _neurons(
    mixture: Mixture, unit: Unit, z_tD: torch.Tensor, dh_tI: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """An expert's neurons h, and the gradient at z of which ``dh_tI`` is the one at h."""
    with torch.enable_grad():
        gate_tI = (z_tD @ unit.gate_FD.T).requires_grad_()
        up_tI = (z_tD @ unit.up_FD.T).requires_grad_()
        h_tI = mixture.gated(gate_tI, up_tI)
    dgate_tI, dup_tI = torch.autograd.grad(h_tI, (gate_tI, up_tI), dh_tI)
    return h_tI.detach(), (dgate_tI @ unit.gate_FD).addmm_(dup_tI, unit.up_FD)
