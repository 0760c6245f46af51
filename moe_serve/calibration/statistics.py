"""Sufficient statistics of one layer's experts. All sums, so shards and machines add up.

Shape suffixes: T tokens, D hidden size, N experts, I neurons per expert, C domains (categories),
S reservoir tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

import torch

from moe_serve.calibration.mixture import Mixture
from moe_serve.checkpoint.finite import all_finite
from moe_serve.errors import CalibrationError

SUMS: Final = ("count_CN", "weight_CN", "weighted_norm_CN", "norm_CN", "square_CN")
"""Fields that are kept by domain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerStatistics:
    """What one layer's experts did on the calibration tokens. FP32 unless said otherwise."""

    weight: torch.Tensor
    """Σ ω over all tokens [1] (F64)."""
    count_CN: torch.Tensor
    """Tokens that selected the expert, per domain (exact up to 2^53; F64)."""
    weight_CN: torch.Tensor
    """Σ g: router weight received (F64)."""
    weighted_norm_CN: torch.Tensor
    """Σ g‖f(x)‖ over tokens that selected the expert (F64). REAP, arXiv 2510.13999, eq. 5."""
    norm_CN: torch.Tensor
    """Σ ‖f(x)‖ (F64)."""
    square_CN: torch.Tensor
    """Σ ‖f(x)‖² (F64)."""
    normal_NII: torch.Tensor
    """Σ ω g² h hᵀ, h the expert's neurons, ω the token's domain weight."""
    output_ND: torch.Tensor
    """Σ ω f(x) over tokens that selected the expert."""
    routed_N: torch.Tensor
    """Σ ω g² (F64)."""
    routed_ND: torch.Tensor
    """Σ ω g² f(x): over :attr:`routed_N` it is the constant that stands for the expert best."""
    reservoir_SD: torch.Tensor
    """The layer's mixture input z at a fixed random sample of the corpus' tokens; zero at those
    that belong to another shard, so that reservoirs add up like all the rest."""
    reservoir_domain_S: torch.Tensor
    """Domain of each reservoir token (I64)."""

    @staticmethod
    def shapes(
        *, domains: int, experts: int, width: int, hidden: int, reservoir: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → (safetensors type, shape) of every field."""
        sums = ("F64", (domains, experts))
        return {
            "weight": ("F64", (1,)),
            **dict.fromkeys(SUMS, sums),
            "normal_NII": ("F32", (experts, width, width)),
            "output_ND": ("F32", (experts, hidden)),
            "routed_N": ("F64", (experts,)),
            "routed_ND": ("F32", (experts, hidden)),
            "reservoir_SD": ("F32", (reservoir, hidden)),
            "reservoir_domain_S": ("I64", (reservoir,)),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Field name → tensor."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> LayerStatistics:
        """The inverse of :meth:`tensors`."""
        return cls(**tensors)

    def weighted(self, omega_C: Sequence[float]) -> LayerStatistics:
        """The sums per domain times ω of the domain's tokens; the others are sums with ω already.

        Without this, experts would be ranked by how many tokens a domain happens to have.
        """
        factor_C1 = torch.tensor(omega_C, dtype=torch.float64)[:, None]
        return replace(self, **{name: getattr(self, name) * factor_C1 for name in SUMS})

    def reap(self) -> torch.Tensor:
        """REAP saliency [N]: mean of g‖f‖ over the tokens that selected the expert.

        Source: arXiv 2510.13999, eq. 5. Zero for an expert no token reached.
        """
        total_N = self.weighted_norm_CN.sum(dim=0)
        return total_N / self.count_CN.sum(dim=0).clamp(min=1)

    def frequency(self) -> torch.Tensor:
        """Share of selections [N]; sums to one."""
        count_N = self.count_CN.sum(dim=0)
        return count_N / count_N.sum().clamp(min=1)


class Accumulator:
    """Builds one layer's statistics batch by batch.

    Memory: the N normal matrices, FP32, and one batch.
    """

    def __init__(
        self,
        *,
        domains: int,
        experts: int,
        width: int,
        hidden: int,
        reservoir: int,
        device: torch.device,
    ) -> None:
        """Start at zero; ``device`` is where the batches are."""

        def exact(*sides: int) -> torch.Tensor:
            # Sum in FP64: FP32 drifts visibly after 10^8 tokens.
            return torch.zeros(*sides, dtype=torch.float64, device=device)

        self._domains = domains
        self._sums_NCV = exact(experts, domains, len(SUMS))
        self._weight = exact(1)
        home = _home(device, experts * width**2 * 4)
        self._normal_NII = torch.zeros(experts, width, width, device=home)
        self._output_ND = torch.zeros(experts, hidden, device=device)
        self._routed_N = exact(experts)
        self._routed_ND = torch.zeros(experts, hidden, device=device)
        self._reservoir_SD = torch.zeros(reservoir, hidden)
        self._reservoir_domain_S = torch.zeros(reservoir, dtype=torch.int64)

    def observe(
        self,
        mixture: Mixture,
        z_TD: torch.Tensor,
        domain_T: torch.Tensor,
        omega_T: torch.Tensor,
        sample: Mapping[int, int],
    ) -> torch.Tensor:
        """Add a batch; return the mixture's output [T, D].

        Args:
            mixture: an untouched layer: unit e is expert e.
            z_TD: the mixture's inputs.
            domain_T: each token's domain, where the inputs are.
            omega_T: each token's weight.
            sample: which tokens of the batch belong to the reservoir, and to which row of it.

        Raises:
            CalibrationError: the activations are not finite.
        """
        if not all_finite(z_TD):
            raise CalibrationError(
                "hidden states hold NaN or infinite values",
                remedy="weights of an earlier layer are damaged, or the model overflows: compare "
                "the files' SHA-256 with the source",
            )
        self._weight += omega_T.double().sum()
        chosen, rows = list(sample), list(sample.values())
        self._reservoir_SD[rows] = z_TD[chosen].cpu()
        self._reservoir_domain_S[rows] = domain_T[chosen].cpu()
        domain_TC = torch.nn.functional.one_hot(domain_T, self._domains).double()
        out_TD = mixture.always(z_TD)
        for unit, index, weight_t, h_tI in mixture.activations(z_TD):
            (expert,) = unit.owners
            f_tD = h_tI @ unit.down_DF.T
            out_TD.index_add_(0, index, f_tD * weight_t[:, None])
            norm_t = f_tD.norm(dim=1)
            terms = (torch.ones_like(norm_t), weight_t, weight_t * norm_t, norm_t, norm_t.square())
            # A product, as adding by index has no fixed order on a GPU.
            self._sums_NCV[expert] += domain_TC[index].T @ torch.stack(terms, dim=1).double()
            omega_t = omega_T[index]
            scaled_tI = h_tI * (weight_t * omega_t.sqrt())[:, None]
            if scaled_tI.device == self._normal_NII.device:
                self._normal_NII[expert].addmm_(scaled_tI.T, scaled_tI)
            else:
                self._normal_NII[expert] += (scaled_tI.T @ scaled_tI).cpu()
            self._output_ND[expert] += omega_t @ f_tD
            square_t = omega_t * weight_t.square()
            self._routed_N[expert] += square_t.double().sum()
            self._routed_ND[expert] += square_t @ f_tD
        return out_TD

    def result(self) -> LayerStatistics:
        """The statistics of everything observed."""
        sums_CNV = self._sums_NCV.transpose(0, 1).cpu()
        return LayerStatistics(
            **{name: sums_CNV[..., i].contiguous() for i, name in enumerate(SUMS)},
            weight=self._weight.cpu(),
            normal_NII=self._normal_NII.cpu(),
            output_ND=self._output_ND.cpu(),
            routed_N=self._routed_N.cpu(),
            routed_ND=self._routed_ND.cpu(),
            reservoir_SD=self._reservoir_SD,
            reservoir_domain_S=self._reservoir_domain_S,
        )


def _home(device: torch.device, size: int) -> torch.device:
    """Where so many bytes of sums grow: on the GPU if they leave half of what is free there.

    Elsewhere every batch would send as many bytes over the bus.
    """
    if device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] // 2:
        return device
    return torch.device("cpu")
