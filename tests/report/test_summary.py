"""What the page warns of, from what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from moe_serve.report.catalogue import LANGUAGES, Catalogue
from moe_serve.report.summary import _quality_risks


def measured(mean: float, worst: float, **more: Any) -> dict[str, Any]:
    """What ``compare --json`` says, as far as it matters here."""
    return {
        "quality": {
            "mean": {"kl_nats": mean},
            "worst_domain": {"kl_nats": worst, "domain": "law"},
        },
        **more,
    }


@pytest.mark.parametrize(
    ("mean", "worst", "warned"), [(0.1, 0.15, False), (0.1, 0.16, True), (0.0, 0.0, False)]
)
def test_a_domain_that_loses_half_again_as_much_is_named(
    mean: float, worst: float, *, warned: bool
) -> None:
    """1.6 times the average is said; 1.5 times, and nothing of nothing, are not."""
    found = _quality_risks(measured(mean, worst), Catalogue.of("en"))
    expected = ["law loses more than the others: KL 0.160 nats, 1.6 times the average."]
    assert found == (expected if warned else [])


@pytest.mark.parametrize("language", LANGUAGES)
def test_figures_from_texts_that_were_calibrated_on_are_called_so(language: str) -> None:
    """By the files' names."""
    found = _quality_risks(measured(0.1, 0.1, overlap=["a.jsonl", "b.txt"]), Catalogue.of(language))
    assert len(found) == 1
    assert "a.jsonl, b.txt" in found[0]
