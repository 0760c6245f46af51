"""Alignment undoes a shuffle of the neurons, which changes nothing an expert does."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from moe_serve.pruning.methods.alignment import (
    Alignment,
    _scaled_rows,
    aligned_distances,
    by_correlation,
    by_distances,
    by_weights,
    keep_order,
)
from tests.support.experts import mixture_of, random_unit, shuffled

ORDER = [3, 0, 5, 1, 4, 2]
"""The copy's neuron 0 is the original's neuron 3; so original 3 is found at copy 0."""
INVERSE = [1, 3, 5, 0, 4, 2]


@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("align", [by_weights, by_correlation, by_distances])
def test_a_shuffled_copy_is_put_back_in_order(align: Alignment, *, with_tokens: bool) -> None:
    """Exactly, with activations and without."""
    torch.manual_seed(0)
    unit = random_unit(0)
    mixture = mixture_of([unit, shuffled(unit, 1, ORDER)])
    tokens = torch.randn(40, 8) if with_tokens else None
    assert align(mixture, tokens, 0, 1) == INVERSE
    assert align(mixture, tokens, 1, 0) == ORDER
    assert keep_order(mixture, tokens, 0, 1) == [0, 1, 2, 3, 4, 5]


def test_a_matrix_of_large_weights_has_no_more_say() -> None:
    """Each neuron's rows of gate, up and down count one each, however large."""
    unit = random_unit(0)
    large = dataclasses.replace(unit, gate_FD=50.0 * unit.gate_FD)
    assert _scaled_rows(large).square().sum(dim=1).tolist() == pytest.approx([3.0] * 6)
    torch.testing.assert_close(_scaled_rows(large), _scaled_rows(unit))


def test_correlation_finds_the_order_where_weights_alone_would_be_a_guess() -> None:
    """Gate and up disturbed, down unrelated: the activations still belong together."""
    torch.manual_seed(1)
    unit, noise = random_unit(0), random_unit(1)
    copy = shuffled(unit, 1, ORDER)
    disturbed = dataclasses.replace(
        copy,
        gate_FD=copy.gate_FD + 0.3 * noise.gate_FD,
        up_FD=copy.up_FD + 0.3 * noise.up_FD,
        down_DF=noise.down_DF,
    )
    assert by_correlation(mixture_of([unit, disturbed]), torch.randn(200, 8), 0, 1) == INVERSE


def test_distance_is_zero_to_a_shuffled_copy_and_frobenius_to_a_changed_one() -> None:
    """One weight of the copy moved by 3: distance 3. The other pairs by trying all orders."""
    torch.manual_seed(3)
    unit = random_unit(0, width=4)
    moved = shuffled(unit, 2, [2, 0, 3, 1])
    moved.gate_FD[1, 1] += 3.0
    other = random_unit(3, width=4)
    distance = aligned_distances(mixture_of([unit, shuffled(unit, 1, [1, 3, 0, 2]), moved, other]))
    assert float(distance[0, 1]) == pytest.approx(0.0, abs=1e-5)
    assert float(distance[0, 2]) == pytest.approx(3.0, rel=1e-5)
    rows = [torch.cat([u.gate_FD, u.up_FD, u.down_DF.T], dim=1) for u in (unit, other)]
    least = min(
        float((rows[0] - rows[1][list(order)]).norm()) for order in itertools.permutations(range(4))
    )
    assert float(distance[0, 3]) == pytest.approx(least, rel=1e-5)
    assert torch.equal(distance, distance.T)
