"""Contexts computed once: rows as they are laid out, and the same figures as one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.evaluation.forks import Fork, forked, visible
from moe_serve.evaluation.stored import StoredModel
from moe_serve.progress import SILENT
from tests.support.models import FAMILIES, make_model

CPU = torch.device("cpu")


def test_a_row_by_hand() -> None:
    """Context 7 8, then 1 2 3 and 4 5: last tokens are left out, places go on from the context."""
    fork = Fork(context=(7, 8), continuations=((1, 2, 3), (4, 5)))
    ids, places, branch = fork.row(6)
    assert fork.length == 5
    assert ids.tolist() == [7, 8, 1, 2, 4, 0]
    assert places[:5].tolist() == [0, 1, 2, 3, 2]
    assert branch.tolist() == [0, 0, 1, 1, 2, 2]
    assert list(fork.outputs()) == [[1, 2, 3], [1, 4]]
    seen = visible(torch.from_numpy(branch)[None])[0, 0]
    assert [row.nonzero()[:, 0].tolist() for row in seen[:5]] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 4],
    ]


def test_a_context_is_found_again() -> None:
    """Also where others were asked about in between; numbers lead back to the pairs."""
    pairs = [((1,), (2,)), ((3,), (4,)), ((1,), (5, 6))]
    assert forked(pairs) == {
        Fork(context=(1,), continuations=((2,), (5, 6))): [0, 2],
        Fork(context=(3,), continuations=((4,),)): [1],
    }


@given(st.integers(1, 3000), st.lists(st.integers(0, 3000), min_size=1, max_size=9))
def test_no_row_grows_without_bound(context: int, lengths: list[int]) -> None:
    """Continuations stay in order; several share a row only within its room."""
    fork = Fork(context=(1,) * context, continuations=tuple((2,) * n for n in lengths))
    parts = list(fork.parts())
    assert sum((part.continuations for part in parts), ()) == fork.continuations
    assert all(part.length <= max(1024, 2 * context) for part in parts if not part.plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_together_is_one_by_one(family: str, tmp_path: Path) -> None:
    """Every family's attention and places: continuations of any length, none among them."""
    model = StoredModel.at(make_model(tmp_path / "m", family), CPU, 512)
    generator = torch.Generator().manual_seed(0)
    forks = [
        Fork(
            context=tuple(torch.randint(1, 250, (length,), generator=generator).tolist()),
            continuations=tuple(
                tuple(torch.randint(1, 250, (n,), generator=generator).tolist()) for n in lengths
            ),
        )
        for length, lengths in ((40, (3, 1, 9, 0)), (5, (2,)), (1, (4, 4, 30)), (33, (5, 2, 2, 2)))
    ]
    for fork, found in zip(forks, model.follow(forks, 2, SILENT), strict=True):
        rows = [(*fork.context, *ids) for ids in fork.continuations]
        alone = list(model.expect(rows, 2, SILENT))
        for ids, places, whole in zip(fork.continuations, found, alone, strict=True):
            assert len(places) == len(ids)
            for place, other in zip(places, whole[len(fork.context) - 1 :], strict=True):
                assert place.first == other.first
                assert place.listed == pytest.approx(other.listed, abs=2e-4)
