"""Rounding with feedback against its definition."""

from __future__ import annotations

import pytest
import torch

from moe_serve.checkpoint.quantisation import Scheme
from moe_serve.checkpoint.quantisation.plain import Plain
from moe_serve.pruning.fitting.rounding import round_neurons
from tests.checkpoint.test_quantisation import SCHEMES

NEURONS, HIDDEN = 64, 32
UNITS = [slice(0, 32), slice(32, 64)]


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the normal matrix of correlated activations."""
    torch.manual_seed(0)
    p = torch.randn(500, 16).double() @ torch.randn(16, NEURONS).double()
    p += 0.3 * torch.randn(500, NEURONS).double()
    normal = p.T @ p
    normal.diagonal().add_(0.01 * normal.diagonal().mean())
    return torch.randn(NEURONS, HIDDEN).double(), normal


def error(scheme: Scheme, stored: list[dict[str, torch.Tensor]]) -> float:
    """Σ ‖P (W - Ŵ)‖²."""
    w, normal = problem()
    off = w - torch.cat([scheme.dequantise(m) for m in stored], dim=1).T.double()
    return float((off * (normal @ off)).sum())


@pytest.mark.parametrize("name", [n for n in SCHEMES if n not in ("plain", "int8")])
def test_feedback_leaves_less_output_error(name: str) -> None:
    """On correlated neurons, much less than rounding each to nearest."""
    scheme = SCHEMES[name]
    w, normal = problem()
    plain = [scheme.quantise(w[unit].T.float()) for unit in UNITS]
    found = round_neurons(w, normal, scheme, UNITS)
    assert [scheme.size(m) for m in found] == [(HIDDEN, 32)] * 2
    assert error(scheme, found) < 0.7 * error(scheme, plain)


def test_each_step_is_the_published_one() -> None:
    """INT8 under one group's scales: a loop over neurons with H⁻¹ shrunk by elimination."""
    scheme = SCHEMES["int8"]
    w, normal = problem()
    w, normal = w[:32], normal[:32, :32]
    grid = scheme.grid(scheme.quantise(w.T.float()))
    left, inverse = w.clone(), torch.linalg.inv(normal)
    for j in range(32):
        rounded = grid.nearest(left[j].float(), j).double()
        gap = (left[j] - rounded) / inverse[j, j]
        left -= inverse[:, j, None] * gap
        left[j] = rounded
        inverse -= inverse[:, j, None] * inverse[None, j] / inverse[j, j]
        inverse[j, j] = 1.0
    (found,) = round_neurons(w, normal, scheme, [slice(0, 32)])
    torch.testing.assert_close(scheme.dequantise(found).T.double(), left, rtol=0, atol=2e-3)


def test_plain_numbers_are_rounded_to_nearest() -> None:
    """BF16 needs no feedback: the bytes are those of a cast."""
    w, normal = problem()
    first, second = round_neurons(w, normal, Plain(dtype="BF16"), UNITS)
    both = torch.cat([first["weight"], second["weight"]], dim=1)
    assert torch.equal(both, w.T.to(torch.bfloat16))
