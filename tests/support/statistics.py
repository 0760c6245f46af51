"""Statistics of a layer made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_serve.calibration.statistics import LayerStatistics


def layer_statistics(
    *, count: Sequence[float], weighted_norm: Sequence[float], reservoir: torch.Tensor | None = None
) -> LayerStatistics:
    """One domain; what is not given is zero."""
    experts = len(count)
    z_SD = torch.zeros(1, 8) if reservoir is None else reservoir
    zero_CN = torch.zeros(1, experts, dtype=torch.float64)
    return LayerStatistics(
        weight=torch.ones(1, dtype=torch.float64),
        count_CN=torch.tensor([list(count)], dtype=torch.float64),
        weight_CN=zero_CN,
        weighted_norm_CN=torch.tensor([list(weighted_norm)], dtype=torch.float64),
        norm_CN=zero_CN,
        square_CN=zero_CN,
        normal_NII=torch.zeros(experts, 1, 1),
        output_ND=torch.zeros(experts, z_SD.shape[1]),
        routed_N=torch.zeros(experts, dtype=torch.float64),
        routed_ND=torch.zeros(experts, z_SD.shape[1]),
        reservoir_SD=z_SD,
        reservoir_domain_S=torch.zeros(len(z_SD), dtype=torch.int64),
    )
