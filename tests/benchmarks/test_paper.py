"""Forecasts on paper rest on the right sizes."""

from __future__ import annotations

import json

import pytest

from benchmarks.pruning.paper import MODELS, sizes_of


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Mixtral-8x22B", 140.6), ("Qwen3-235B-A22B", 235.1), ("DeepSeek-V3", 671.0)],
)
def test_sizes_on_paper_are_the_published_ones(name: str, billions: float) -> None:
    """Weights as counted by their authors, multi-token prediction apart."""
    model = json.loads(MODELS.read_text())[name]
    sizes = sizes_of(model["config"], 2)
    assert sizes.total_bytes / 2e9 == pytest.approx(billions, abs=0.06)
