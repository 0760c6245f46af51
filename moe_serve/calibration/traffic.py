"""How often production selected each expert: counts that engines exported, never texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

import torch
from prometheus_client.parser import text_string_to_metric_families

from moe_serve.calibration.gradients import LayerGradients
from moe_serve.calibration.statistics import LayerStatistics
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.errors import CalibrationError
from moe_serve.files import reading

METRIC: Final = "moe_serve_expert_selections_total"
_REMEDY: Final = "save an engine's /metrics page that runs with MOE_SERVE_EXPERT_SELECTIONS=1"

Counts = Mapping[int, tuple[int, ...]]
"""Layer → selections of each expert."""
Sums = TypeVar("Sums", LayerStatistics, LayerGradients)


def read_traffic(pages: Sequence[Path], checkpoint: Checkpoint) -> dict[int, tuple[int, ...]]:
    """Add up the counts of saved ``/metrics`` pages of engines that serve this model.

    Raises:
        CalibrationError: a page is no such page, or its layers and experts are not this model's.
    """
    layers = checkpoint.family.moe_layers(checkpoint.config)
    totals = {layer: dict.fromkeys(range(checkpoint.shape.experts), 0) for layer in layers}
    for page in pages:
        try:
            with reading(page):
                families = list(text_string_to_metric_families(page.read_text()))
            for sample in (s for family in families for s in family.samples if s.name == METRIC):
                layer, expert = int(sample.labels["layer"]), int(sample.labels["expert"])
                totals[layer][expert] += int(sample.value)
        except (ValueError, KeyError, OverflowError) as exc:
            raise CalibrationError(
                f"is no page of {METRIC} for a model with {checkpoint.shape.experts} experts in "
                f"layers {', '.join(map(str, layers))}",
                where=str(page),
                remedy=_REMEDY,
            ) from exc
    if silent := [str(layer) for layer, counts in totals.items() if not any(counts.values())]:
        raise CalibrationError(
            f"count no selection in layers {', '.join(silent)}",
            where=", ".join(map(str, pages)),
            remedy=_REMEDY,
        )
    return {layer: tuple(counts.values()) for layer, counts in totals.items()}


def as_in_traffic(sums: Sums, observed_N: torch.Tensor, seen_N: torch.Tensor) -> Sums:
    """Each expert's sums as if it had been selected as often as in production.

    What the texts showed of an expert, per selection, stays; its part of all selections becomes
    production's. An expert that no text reached stays without statistics.

    Args:
        sums: of one layer.
        observed_N: selections on the calibration texts.
        seen_N: selections in production.
    """
    observed, seen = observed_N.double(), seen_N.double()
    part_N = observed / observed.sum()
    factor_N = torch.where(part_N > 0, seen / seen.sum() / part_N, 1.0)
    changed = {}
    for name, tensor in sums.tensors().items():
        axes = name.rpartition("_")[2]
        if "N" in axes:
            shape = [1] * tensor.ndim
            shape[axes.index("N")] = -1
            changed[name] = (tensor * factor_N.view(shape)).to(tensor.dtype)
    return replace(sums, **changed)
