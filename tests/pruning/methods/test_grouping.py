"""Groups from known matrices."""

from __future__ import annotations

import pytest
import torch

from moe_serve.errors import PlanError
from moe_serve.pruning.methods.grouping import (
    around_leaders,
    average_linkage,
    counts_over_layers,
    leaders_of,
    pseudo_pruning,
)


def symmetric(upper: dict[tuple[int, int], float], size: int) -> torch.Tensor:
    """A matrix from its upper triangle."""
    full = torch.zeros(size, size)
    for (i, j), value in upper.items():
        full[i, j] = full[j, i] = value
    return full


def test_average_linkage_by_hand() -> None:
    """Means between groups decide, not nearest members.

    0-1 join at 1. Then {0,1}-2 is (2 + 7) / 2 = 4.5 and 2-3 is 4: 2-3 join, although 0-2 is nearer.
    """
    distance = symmetric(
        {(0, 1): 1.0, (0, 2): 2.0, (1, 2): 7.0, (0, 3): 9.0, (1, 3): 9.0, (2, 3): 4.0}, 4
    )
    assert average_linkage(distance, 4) == [[0], [1], [2], [3]]
    assert average_linkage(distance, 3) == [[0, 1], [2], [3]]
    assert average_linkage(distance, 2) == [[0, 1], [2, 3]]
    assert average_linkage(distance, 1) == [[0, 1, 2, 3]]


def test_rounding_in_a_matrix_of_distances_is_no_obstacle() -> None:
    """An expert 1e-6 from itself, and pairs that differ in the last digits by direction."""
    distance = symmetric({(0, 1): 1.0, (0, 2): 3.0, (1, 2): 3.0}, 3) + 1e-6 * torch.eye(3)
    distance[0, 1] += 1e-6
    assert average_linkage(distance, 2) == [[0, 1], [2]]


def test_others_join_the_leader_they_are_most_like() -> None:
    """1 is most like 3, which leads nothing; of the leaders 0 and 4 it is more like 4."""
    similarity = symmetric({(0, 1): 0.2, (1, 3): 0.9, (1, 4): 0.3, (0, 3): 0.5, (3, 4): 0.4}, 5)
    similarity[2] = torch.tensor([0.1, 0.9, 1.0, 0.9, 0.2])
    assert around_leaders(similarity, [4, 0]) == [[4, 1, 2], [0, 3]]


def test_the_first_leaders_take_in_all() -> None:
    """Groups of three: 5 takes the two most like it, 2 takes the last, 0 stays alone."""
    similarity = symmetric({(1, 5): 0.9, (3, 5): 0.1, (4, 5): 0.8, (0, 3): 1.0, (2, 3): 0.0}, 6)
    assert pseudo_pruning(similarity, [5, 2, 0], 3) == [[5, 1, 4], [2, 3], [0]]


def test_groups_too_small_for_all_are_refused() -> None:
    """Two groups of two don't hold five."""
    with pytest.raises(PlanError, match="do not hold 5"):
        pseudo_pruning(torch.zeros(5, 5), [0, 1], 2)


def test_leaders_are_the_best_and_ties_go_to_the_lower_id() -> None:
    """Scores 1, 3, 3, 2: ids 1, 2, 3."""
    assert leaders_of(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3) == [1, 2, 3]


def test_the_models_best_experts_decide_how_many_each_layer_keeps() -> None:
    """Of .6 .2 .2 and .5 .4 .1 the best four are .6 .5 .4 and the earlier .2."""
    worth = {3: torch.tensor([0.2, 0.6, 0.2]), 7: torch.tensor([0.5, 0.4, 0.1])}
    assert counts_over_layers(worth, 4) == {3: 2, 7: 2}
    assert counts_over_layers(worth, 3) == {3: 1, 7: 2}


def test_every_layer_keeps_its_least() -> None:
    """A layer whose experts are all worth little keeps one, or as many as asked."""
    worth = {0: torch.tensor([0.1, 0.1, 0.1]), 1: torch.tensor([0.9, 0.8, 0.7])}
    assert counts_over_layers(worth, 3) == {0: 1, 1: 2}
    assert counts_over_layers(worth, 4, least=2) == {0: 2, 1: 2}
    with pytest.raises(PlanError, match="fewer than 2 in each"):
        counts_over_layers(worth, 3, least=2)
