"""All experts of a layer on the same tokens, and what a change of the layer does to its output.

Shape suffixes: S reservoir tokens, N experts, I neurons per expert, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from moe_serve.calibration.mixture import Mixture, Unit

_HELD_OUT: Final = 4
"""One token in so many only judges."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reservoir:
    """Memory: every expert's output on every token, N · S · D numbers of FP32."""

    mixture: Mixture
    """An untouched layer: unit e is expert e."""
    z_SD: torch.Tensor
    output_NSD: torch.Tensor
    """f_e(z) of every expert, selected or not, without the router's weight."""
    weights_SN: torch.Tensor
    """What the router gives; zero where it does not select."""

    @classmethod
    def of(cls, mixture: Mixture, z_SD: torch.Tensor) -> Reservoir:
        """Run all experts; every fourth token goes last, where :meth:`held_out` finds it."""
        place_S = torch.arange(len(z_SD))
        judges_S = place_S % _HELD_OUT == _HELD_OUT - 1
        z_SD = torch.cat([z_SD[~judges_S], z_SD[judges_S]])
        outputs = [mixture.hidden(u, z_SD) @ u.down_DF.T for u in mixture.units]
        return cls(
            mixture=mixture,
            z_SD=z_SD,
            output_NSD=torch.stack(outputs),
            weights_SN=mixture.router(z_SD),
        )

    def fitting(self) -> Reservoir:
        """The tokens from which a merge may be made."""
        return self._rows(slice(0, self._cut))

    def held_out(self) -> Reservoir:
        """The tokens on which it is judged."""
        return self._rows(slice(self._cut, None))

    @property
    def _cut(self) -> int:
        return len(self.z_SD) - len(self.z_SD) // _HELD_OUT

    def _rows(self, rows: slice) -> Reservoir:
        """Views, no copies."""
        return Reservoir(
            mixture=self.mixture,
            z_SD=self.z_SD[rows],
            output_NSD=self.output_NSD[:, rows],
            weights_SN=self.weights_SN[rows],
        )

    def logits(self) -> torch.Tensor:
        """Router logits [S, N]."""
        return self.mixture.router.logits(self.z_SD)

    def error(self, *, dropped: Iterable[int] = (), replaced: Mapping[int, Unit]) -> float:
        """Mean squared change of the layer's output.

        Args:
            dropped: experts that can't be selected any more; the router chooses again.
            replaced: experts that become another unit.
        """
        weights_SN = self.weights_SN
        change_SD = torch.zeros_like(self.z_SD)
        if gone := tuple(dropped):
            fewer = dataclasses.replace(self.mixture.router, dropped=gone)
            weights_SN = fewer(self.z_SD)
            change_SD = torch.einsum("sn,nsd->sd", weights_SN - self.weights_SN, self.output_NSD)
        outputs: dict[int, torch.Tensor] = {}
        for expert, unit in replaced.items():
            if id(unit) not in outputs:
                outputs[id(unit)] = self.mixture.hidden(unit, self.z_SD) @ unit.down_DF.T
            new_SD = outputs[id(unit)] - self.output_NSD[expert]
            change_SD = change_SD + weights_SN[:, [expert]] * new_SD
        return float(change_SD.square().sum(dim=1).mean())
