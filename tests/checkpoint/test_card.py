"""The model card's metadata, as the hub reads it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from moe_serve.checkpoint.card import model_card
from moe_serve.checkpoint.manifest import ExpertBytes, LayerCounts, Manifest, Original


def manifest(name: str, calibration: dict[str, Any] | None = None) -> Manifest:
    """Of one layer, half kept."""
    return Manifest(
        moe_serve_version="1",
        format="compact",
        original=Original(name=name, config_sha256="", weights={}),
        method="block-obs",
        settings={},
        seed=0,
        plan_sha256="",
        statistics_sha256=None,
        calibration=calibration,
        refit=None,
        expert_bytes=ExpertBytes(original=2000, kept=1000),
        layers={0: LayerCounts(width=32, blocks=8, dropped=0)},
    )


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("Qwen3-30B-A3B", "Qwen3-30B-A3B"),
        ("123", "123"),  # A name, not a number.
        ("a: [b", None),
        ('<img src="x">', None),
        ("---", None),
    ],
)
def test_metadata_is_valid_whatever_the_name(name: str, base: str | None) -> None:
    """One YAML mapping between the first two rules; no base model that the hub would reject."""
    _, front, _ = model_card(manifest(name), served=True).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "as-original",
        "tags": ["mixture-of-experts", "pruned", "moe-serve"],
    } | ({"base_model": base} if base else {})


def test_the_card_counts_calibration_by_domain() -> None:
    """So that a domain hardly covered is seen at once."""
    record = {"tokens": {"code": 2048, "prose": 12}, "domains": ["code", "prose"], "sources": []}
    card = model_card(manifest("m", record), served=True)
    assert "2,060 tokens from 2 domains:\ncode (2,048), prose (12).\n" in card
    assert "moe-serve report . -o report.html" in card
