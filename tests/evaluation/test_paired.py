"""Paired figures: by hand, and how often their intervals hold what they are for."""

from __future__ import annotations

import numpy as np
import pytest

from moe_serve.evaluation.paired import Paired, mean_of, paired


def test_by_hand() -> None:
    """Of 10 items only the original gets 6 right, only the pruned one 1.

    p = 2·(C(7,0) + C(7,1)) / 2⁷ = 16/128; with halves added: (1.5 - 6.5) / 12 = -5/12.
    """
    original = [1] * 6 + [0] + [1, 0, 1]
    pruned = [0] * 6 + [1] + [1, 0, 1]
    found = paired(original, pruned)
    assert (found.only_original, found.only_pruned) == (6, 1)
    assert found.difference == pytest.approx(-0.5)
    assert found.p == pytest.approx(16 / 128)
    assert found.low is not None
    assert found.high is not None
    assert (found.low + found.high) / 2 == pytest.approx(-5 / 12)
    assert found.verdict(higher_is_better=True) == "unsettled"


def test_verdict_follows_what_is_better() -> None:
    """Twenty items lost and none won are worse; twenty errors fewer are better."""
    lost = paired([1] * 20, [0] * 20)
    assert lost.verdict(higher_is_better=True) == "worse"
    assert lost.verdict(higher_is_better=False) == "better"
    slower = paired([1.0, 2.0, 3.0, 4.0], [2.1, 3.0, 3.9, 5.0])
    assert slower.test == "t"
    assert slower.difference == pytest.approx(1.0)
    assert slower.verdict(higher_is_better=False) == "worse"


def test_a_model_and_itself() -> None:
    """No difference and no doubt; of other models that agree on all items, doubt remains."""
    same = paired([1, 0, 1], [1, 0, 1], identical=True)
    assert (same.low, same.high, same.p) == (0.0, 0.0, 1.0)
    assert same.verdict(higher_is_better=True) == "same"
    assert mean_of([same, same]).verdict(higher_is_better=True) == "same"
    alike = paired([1, 0, 1], [1, 0, 1])
    assert alike.low is not None
    assert alike.low < 0
    assert alike.verdict(higher_is_better=True) == "unsettled"


def test_few_items_that_differ_alike_settle_nothing() -> None:
    """Two that gain the same have no spread: such a sign comes of two coins one time in two."""
    two, eight = (paired([0.5] * n, [0.75] * n) for n in (2, 8))
    assert (two.p, two.verdict(higher_is_better=True)) == (0.5, "unsettled")
    assert (eight.p, eight.verdict(higher_is_better=True)) == (2 / 2**8, "better")


def test_one_item_has_no_interval() -> None:
    """It says nothing of others, nor does a mean with it."""
    one = paired([1], [0])
    assert (one.low, one.p, one.verdict(higher_is_better=True)) == (None, None, "unsettled")
    assert mean_of([one, paired([1, 0], [0, 0])]).high is None


REPEATS = 1500


def right_or_wrong(rng: np.random.Generator, count: int, lost: float, won: float) -> Paired:
    """Items of which the original alone gets a share ``lost`` right, the pruned one ``won``."""
    kind = rng.choice(3, size=count, p=[lost, won, 1 - lost - won])
    return paired((kind == 0).tolist(), (kind == 1).tolist())


def covered(found: list[Paired], true: float) -> float:
    """Share of the intervals that hold it."""
    return float(np.mean([f.low <= true <= f.high for f in found]))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("count", "lost", "won"),
    [(60, 0.1, 0.05), (120, 0.1, 0.1), (120, 0.2, 0.05), (480, 0.05, 0.02)],
)
def test_right_or_wrong_covers(count: int, lost: float, won: float) -> None:
    """93 to 97 % of 1,500; 0.6 % is one standard error of that."""
    rng = np.random.default_rng(count)
    found = [right_or_wrong(rng, count, lost, won) for _ in range(REPEATS)]
    assert 0.93 <= covered(found, won - lost) <= 0.97


@pytest.mark.parametrize("count", [5, 20, 120])
def test_other_values_cover(count: int) -> None:
    """Differences of -0.1 nats on average, with a spread that leans to one side."""
    rng = np.random.default_rng(count)
    draws = -0.1 + (rng.gamma(8.0, 1.0, (REPEATS, count)) - 8.0) * 0.2
    found = [paired([0.25] * count, (0.25 + row).tolist()) for row in draws]
    assert 0.93 <= covered(found, -0.1) <= 0.97


def test_means_of_tasks_cover() -> None:
    """Two tasks of right or wrong and a small one of other values; their mean is -0.05."""
    rng = np.random.default_rng(7)
    found = [
        mean_of(
            [
                right_or_wrong(rng, 60, 0.15, 0.05),
                right_or_wrong(rng, 120, 0.1, 0.1),
                paired([0.5] * 12, rng.normal(0.45, 0.2, 12).tolist()),
            ]
        )
        for _ in range(REPEATS)
    ]
    assert 0.93 <= covered(found, -0.05) <= 0.97


def test_no_difference_is_rarely_called_one() -> None:
    """McNemar's exact test is at most at its level."""
    rng = np.random.default_rng(3)
    verdicts = [
        right_or_wrong(rng, 120, 0.1, 0.1).verdict(higher_is_better=True) for _ in range(REPEATS)
    ]
    assert np.mean([verdict != "unsettled" for verdict in verdicts]) <= 0.06
