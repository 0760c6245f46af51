"""Linear CKA."""

from __future__ import annotations

import pytest
import torch

from moe_serve.pruning.merging import average_linkage
from moe_serve.pruning.similarity import linear_cka


def test_rotation_and_scale_do_not_matter() -> None:
    """CKA of outputs that differ by a rotation and a factor is one."""
    torch.manual_seed(0)
    y = torch.randn(50, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    cka = linear_cka(torch.stack([y, 3.0 * y @ rotation]))
    assert float(cka[0, 1]) == pytest.approx(1.0, abs=1e-5)


def test_unrelated_outputs_are_near_zero_even_with_few_tokens() -> None:
    """The unbiased estimator does not flatter: 64 tokens in 128 dimensions."""
    torch.manual_seed(1)
    y = torch.randn(2, 64, 128)
    biased = (y[0] @ y[0].T * (y[1] @ y[1].T)).sum() / (
        (y[0] @ y[0].T).norm() * (y[1] @ y[1].T).norm()
    )
    assert float(biased) > 0.5
    assert float(linear_cka(y)[0, 1]) < 0.05


def test_a_planted_pair_is_grouped_first() -> None:
    """Of five experts two do the same job: with four groups they share one."""
    torch.manual_seed(2)
    y = torch.randn(5, 80, 8)
    y[3] = y[1] + 0.01 * torch.randn(80, 8)
    groups = average_linkage(linear_cka(y), 4)
    assert [1, 3] in groups
    assert sorted(e for group in groups for e in group) == [0, 1, 2, 3, 4]
