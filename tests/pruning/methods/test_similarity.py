"""Similarities against hand arithmetic."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_serve.pruning.methods.grouping import average_linkage
from moe_serve.pruning.methods.similarity import (
    gated_similarity,
    gradient_cosine,
    linear_cka,
    logit_cosine,
    mean_output_distance,
    surrogate_cka,
)
from tests.support.experts import random_unit, shuffled


def test_rotation_and_scale_do_not_matter() -> None:
    """CKA of outputs that differ by a rotation and a factor is one."""
    torch.manual_seed(0)
    y = torch.randn(50, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    cka = linear_cka(torch.stack([y, 3.0 * y @ rotation]))
    assert float(cka[0, 1]) == pytest.approx(1.0, abs=1e-5)


def test_cka_is_the_published_unbiased_estimate() -> None:
    """Seven tokens; Song et al. 2012, eq. 5, sum by sum, with zero diagonals.

    (Σ_ij K_ij L_ij + Σ K Σ L / ((n-1)(n-2)) - 2 Σ_ijk K_ij L_jk / (n-2)) / (n (n-3)).
    """
    torch.manual_seed(4)
    y = torch.randn(2, 7, 3, dtype=torch.float64)
    grams = [(a @ a.T).fill_diagonal_(0.0) for a in y]

    def hsic(k: torch.Tensor, m: torch.Tensor) -> float:
        spread = float((k * m).sum())
        whole = float(k.sum() * m.sum()) / (6 * 5)
        crossed = sum(float(k[i] @ m[j]) for i in range(7) for j in range(7))
        return (spread + whole - 2 * crossed / 5) / (7 * 4)

    first, second = grams
    expected = hsic(first, second) / (hsic(first, first) * hsic(second, second)) ** 0.5
    assert float(linear_cka(y)[0, 1]) == pytest.approx(expected, rel=1e-9)


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
    groups = average_linkage(1 - linear_cka(y), 4)
    assert [1, 3] in groups
    assert sorted(e for group in groups for e in group) == [0, 1, 2, 3, 4]


def test_surrogate_does_not_see_the_order_of_neurons() -> None:
    """A shuffled, rescaled copy is the same; an unrelated expert is not."""
    torch.manual_seed(3)
    unit = random_unit(0, width=20, hidden=32)
    copy = shuffled(unit, 1, torch.randperm(20).tolist())
    copy = dataclasses.replace(copy, up_FD=2.0 * copy.up_FD)
    units = [unit, copy, random_unit(2, width=20, hidden=32)]
    cka = surrogate_cka(units)
    assert float(cka[0, 1]) == pytest.approx(1.0, abs=1e-5)
    assert float(cka[0, 2]) < 0.3
    columns = torch.stack([(u.down_DF @ (u.gate_FD * u.up_FD)).T for u in units])
    torch.testing.assert_close(cka, linear_cka(columns))


def test_distance_of_mean_outputs_by_hand() -> None:
    """Means (1, 1), (4, 5), (1, 0): 3-4-5 and one."""
    outputs = torch.tensor(
        [[[0.0, 2.0], [2.0, 0.0]], [[4.0, 5.0], [4.0, 5.0]], [[2.0, 0.0], [0.0, 0.0]]]
    )
    distance = mean_output_distance(outputs)
    assert distance[0].tolist() == pytest.approx([0.0, 5.0, 1.0])


def test_logits_are_compared_without_centring() -> None:
    """(1, 1) and (3, 3) point the same way, (1, -1) is square to both."""
    logits = torch.tensor([[1.0, 3.0, 1.0], [1.0, 3.0, -1.0]])
    assert logit_cosine(logits)[0].tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-12)


def test_gated_similarity_by_hand() -> None:
    """Three experts, one token: outputs 1, 1 and -1; logits 1, 1 and -1.

    Cosines 1 and -1 become 1 and 0; scaled logit columns lie 0 and 2 (the widest) apart.
    """
    outputs = torch.tensor([[[1.0]], [[1.0]], [[-1.0]]])
    similarity = gated_similarity(outputs, torch.tensor([[1.0, 1.0, -1.0]]))
    assert similarity[0].tolist() == pytest.approx([1.0, 1.0, 0.0])


def test_gating_decides_what_an_experts_mean_output_is() -> None:
    """Two tokens of opposite output: the one with the larger gate gives the sign.

    Softmax of (2, 0) is .88 / .12 and of (0, 2) is .12 / .88: expert 0's mean .88·1 - .12·1 > 0,
    expert 1's .12·1 - .88·1 < 0: cosine -1, although the outputs are the same.
    """
    outputs = torch.tensor([[[1.0], [-1.0]], [[1.0], [-1.0]]])
    similarity = gated_similarity(outputs, torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    # Logit columns (2, 0) and (0, 2) are the widest apart: both halves are zero.
    assert float(similarity[0, 1]) == pytest.approx(0.0)


def test_gradient_cosine_is_of_the_whole_map() -> None:
    """Equal maps 1, opposite -1, disjoint 0, whatever their size."""
    maps = torch.zeros(4, 2, 2)
    maps[0, 0, 1], maps[1, 0, 1], maps[2, 0, 1], maps[3, 1, 0] = 1.0, 5.0, -2.0, 1.0
    assert gradient_cosine(maps)[0].tolist() == pytest.approx([1.0, 1.0, -1.0, 0.0])
