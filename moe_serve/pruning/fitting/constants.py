"""Constants in place of experts, from the tokens that select them.

The constant c = Σ ω w² f(z) / Σ ω w² minimises Σ ω ‖w f(z) - w c‖² over the tokens that select an
expert with weight w. A re-fit then treats it as one more down projection, of a neuron that is
always 1.

Shape suffixes: T tokens, D hidden size, R experts replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from moe_serve.calibration.mixture import Mixture, constant_units
from moe_serve.checkpoint.quantisation import Scheme


class ConstantSums:
    """Builds a layer's constants batch by batch. Memory: 2 R D numbers, FP64."""

    def __init__(self, mixture: Mixture, replaced: Sequence[int]) -> None:
        """Start at zero; ``mixture`` is the untouched layer: unit e is expert e."""
        self.replaced = tuple(replaced)
        self._rows = {expert: row for row, expert in enumerate(self.replaced)}
        units = tuple(mixture.units[expert] for expert in self.replaced)
        self._mixture = dataclasses.replace(mixture, units=units, shared=None)
        self._sum_RD = torch.zeros(
            len(units), mixture.router.weight_ND.shape[1], dtype=torch.float64
        )
        self._weight_R1 = torch.zeros(len(units), 1, dtype=torch.float64)

    def observe(self, z_TD: torch.Tensor, omega_T: torch.Tensor) -> None:
        """Add a batch of the original layer's inputs and their weights."""
        if not self.replaced:
            return
        for unit, index, weight_t, h_tI in self._mixture.activations(z_TD):
            row = self._rows[unit.owners[0]]
            square_t = omega_T.to(z_TD.device)[index] * weight_t.square()
            self._sum_RD[row] += ((square_t @ h_tI) @ unit.down_DF.T).double().cpu()
            self._weight_R1[row] += square_t.double().sum().cpu()

    def result(self, scheme: Scheme) -> torch.Tensor:
        """The constants [R, D], FP32, rounded to the stored format.

        Zero for an expert that no token selected.
        """
        tiny = torch.finfo(torch.float64).tiny
        mean_RD = (self._sum_RD / self._weight_R1.clamp(min=tiny)).float()
        return scheme.dequantise(scheme.quantise(mean_RD)) if self.replaced else mean_RD


def with_constants(
    mixture: Mixture, replaced: Sequence[int], constants_RD: torch.Tensor
) -> tuple[Mixture, Mixture]:
    """The layer with its constants, and the constants alone."""
    home = mixture.router.weight_ND.device
    units = constant_units(dict(zip(replaced, constants_RD.to(home), strict=True)))
    return (
        dataclasses.replace(mixture, units=mixture.units + units),
        dataclasses.replace(mixture, units=units, shared=None),
    )
