"""Experts are dropped so that a router that ranks groups still finds what it selects."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve.calibration.mixture import Router
from moe_serve.errors import PlanError
from moe_serve.families import Routing
from moe_serve.pruning.methods.groups import best_experts


def rule(top_k: int, groups: int, selected: int) -> Routing:
    """DeepSeek-V3's kind."""
    return Routing(
        top_k=top_k,
        score="sigmoid",
        groups=groups,
        groups_selected=selected,
        group_score="best-two",
    )


@settings(max_examples=300, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_the_router_selects_top_k_experts_that_stay(data: st.DataObject, seed: int) -> None:
    """Every token gets top_k kept experts, and no kept expert is in a group out of reach."""
    groups = data.draw(st.sampled_from([1, 2, 3, 4]), "groups")
    size = data.draw(st.integers(2, 4), "group size")
    selected = data.draw(st.integers(1, groups), "groups selected")
    experts = groups * size
    top_k = data.draw(st.integers(1, selected * size), "top_k")
    count = data.draw(st.integers(top_k, experts), "count")
    how = rule(top_k, groups, selected)
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.rand(experts, generator=generator).tolist()
    try:
        kept = best_experts(saliency, count, how)
    except PlanError:
        assert count < -(-top_k // size) * how.group_least
        return
    assert top_k <= len(kept) <= count
    assert len(kept) > count - size
    gone = tuple(sorted(set(range(experts)) - set(kept)))
    router = Router(
        weight_ND=torch.randn(experts, 5, generator=generator),
        rule=how,
        bias_N=torch.randn(experts, generator=generator),
        dropped=gone,
    )
    weights_TN = router(torch.randn(20, 5, generator=generator))
    assert ((weights_TN > 0).sum(dim=1) == top_k).all()
    assert not weights_TN[:, list(gone)].any()


def test_the_choice_is_the_best_sound_one() -> None:
    """Against all subsets: 8 experts in 4 groups of 2, of which 2 are selected, 4 stay.

    The four best, 0 2 4 6, leave one expert in each group, and none can be selected. Whole groups
    have to stay: 0 1 (0.9 + 0.1) and 6 7 (0.6 + 0.5) are the best two.
    """
    saliency = [0.9, 0.1, 0.8, 0.1, 0.7, 0.2, 0.6, 0.5]
    how = rule(2, 4, 2)
    assert how.selection_defects((0, 2, 4, 6), 8)
    sound = [s for s in itertools.combinations(range(8), 4) if not how.selection_defects(s, 8)]
    best = max(sound, key=lambda s: sum(saliency[e] for e in s))
    assert best_experts(saliency, 4, how) == [0, 1, 6, 7] == list(best)


def test_an_expert_out_of_reach_is_not_kept() -> None:
    """Five of groups of two: the fifth would be alone, so four stay."""
    assert best_experts([0.9, 0.1, 0.8, 0.1, 0.7, 0.2, 0.6, 0.5], 5, rule(2, 4, 2)) == [0, 1, 6, 7]


def test_without_groups_the_highest_stay() -> None:
    """Ties go to the lower id."""
    assert best_experts([1.0, 3.0, 1.0, 2.0], 3, Routing(top_k=1)) == [0, 1, 3]


def test_too_few_for_the_groups_is_refused() -> None:
    """Three experts a token from groups of two: two whole groups at least."""
    with pytest.raises(PlanError, match="keep at least 4"):
        best_experts([1.0] * 8, 3, rule(3, 4, 2))


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ((0,), "fewer than top_k=2"),
        ((0, 1, 2, 4, 5), "group 1 keeps too few"),
        ((0, 2, 4, 5), "group 0 keeps too few"),
    ],
)
def test_what_a_router_cannot_select_from_is_said(kept: tuple[int, ...], words: str) -> None:
    """Whole groups may go, even to fewer than are selected; one expert left of two may not."""
    how = rule(2, 4, 2)
    assert how.selection_defects((0, 1), 8) == []
    unequal = Routing(top_k=3, groups=2, groups_selected=1)
    assert "hold fewer than 3" in unequal.selection_defects((0, 1, 4, 5, 6), 8)[0]
    assert words in "; ".join(how.selection_defects(kept, 8))
    assert how.selection_defects((0, 1, 4, 5), 8) == []
