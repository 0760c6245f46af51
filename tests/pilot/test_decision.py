"""What is recommended and what it costs, by figures that can be checked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.pilot.decision import (
    Baseline,
    Option,
    front,
    knee,
    loses_less,
    misses,
    money,
    recommend,
)
from moe_serve.pilot.settings import Hardware, PilotSettings, Prices, Tolerance

ORIGINAL = Baseline(expert_bytes=900, total_bytes=1000, gpus=4)


def option(name: str, size: int, kl: float, **more: Any) -> Option:
    """One of ``size`` bytes that loses ``kl`` nats ± 5 %, twice that in its worst domain."""
    values: dict[str, Any] = {
        "name": name,
        "method": "auto",
        "keep": size / 1000,
        "folder": name,
        "expert_bytes": size - 100,
        "total_bytes": size,
        "gpus": 2,
        "mean_kl": kl,
        "mean_kl_low": 0.95 * kl,
        "mean_kl_high": 1.05 * kl,
        "worst_kl": 2 * kl,
        "worst_kl_high": 2.2 * kl,
        "worst_domain": "c",
        "perplexity_ratio": 1.0,
        "top1": 0.9,
        "machine_seconds": 7200.0,
        "domains": {},
    }
    return Option(**values | more)


def settings(**more: Any) -> PilotSettings:
    """Tolerates 0.05 and 0.1 nats; people need 16 hours."""
    return PilotSettings(model=Path("m"), texts=(Path("t"),), **more)


def test_costs_and_savings() -> None:
    """2 h × 3 + 16 h × 50 = 806; two of four cards × 2 engines × 0.5 × 700 h = 1400 a month."""
    prices = Prices(machine_hour=3, person_hour=50, gpu_hour=0.5, hours_a_month=700)
    wanted = settings(prices=prices, hardware=Hardware(replicas=2))
    found = money(option("a", 700, 0.01), ORIGINAL, wanted)
    assert (found.machine_hours, found.person_hours, found.once) == (2, 16, 806)
    assert (found.gpus_saved, found.monthly) == (4, 1400)
    assert found.payback_months == pytest.approx(806 / 1400)


def test_no_card_less_pays_nothing_back() -> None:
    """And where the original fits nowhere no saving is claimed."""
    same = money(option("a", 700, 0.01, gpus=4), ORIGINAL, settings())
    assert (same.gpus_saved, same.monthly, same.payback_months) == (0, 0, None)
    nowhere = Baseline(expert_bytes=900, total_bytes=1000, gpus=None)
    unknown = money(option("a", 700, 0.01), nowhere, settings())
    assert (unknown.gpus_saved, unknown.monthly, unknown.payback_months) == (None, None, None)


def test_the_price_changes_the_payback_and_the_tolerance_the_choice() -> None:
    """Twice the price of a card, half the months; a wider tolerance, a smaller model."""
    options = [option("a", 750, 0.01), option("b", 500, 0.06)]
    cheap, dear = (settings(prices=Prices(gpu_hour=p)) for p in (1, 2))
    months = [money(options[0], ORIGINAL, s).payback_months for s in (cheap, dear)]
    assert months[0] is not None
    assert months[1] == pytest.approx(months[0] / 2)
    assert recommend(options, settings()).option is options[0]
    wide = settings(tolerance=Tolerance(mean_kl_nats=0.1, worst_kl_nats=0.2))
    assert recommend(options, wide).option is options[1]
    assert (
        recommend(options, settings(prefer="quality", tolerance=wide.tolerance)).option
        is (options[0])
    )


def test_fewer_cards_come_before_both() -> None:
    """The best that fits one card, though a better one fits two."""
    options = [option("a", 750, 0.01), option("b", 500, 0.03, gpus=1)]
    assert recommend(options, settings(prefer="quality")).option is options[1]


def test_nothing_within_tolerance_is_said() -> None:
    """0.06 is 1.2 times the mean's tolerance, and twice 0.12 beyond the other's 1.2 times."""
    options = [option("a", 750, 0.06), option("b", 500, 0.2)]
    found = recommend(options, settings())
    assert found.option is None
    assert found.nearest is options[0]
    assert misses(options[0], Tolerance()) == ["mean_kl_nats", "worst_kl_nats"]
    assert misses(option("c", 1, 0.0), Tolerance(top1_agreement=0.95)) == ["top1_agreement"]


def test_an_interval_beyond_the_tolerance_is_told() -> None:
    """0.047 × 2.2 = 0.103 > 0.1, though 0.094 is not."""
    assert recommend([option("a", 750, 0.047)], settings()).uncertain
    assert not recommend([option("a", 750, 0.04)], settings()).uncertain


def test_the_knee_is_where_the_line_bends() -> None:
    """Half of the way for a tenth of the loss: 0.5 - 0.1 below the line; the ends are on it."""
    bend, last = option("bend", 750, 0.01), option("last", 500, 0.1)
    assert knee([last, bend], ORIGINAL) is bend
    assert knee([last], ORIGINAL) is None
    straight = [option("a", 750, 0.05), last]
    assert knee(straight, ORIGINAL) is None


def test_what_the_texts_do_not_tell_apart_is_no_better() -> None:
    """0.0100 ± 0.0005 and 0.0104 ± 0.0005 overlap, 0.0200 ± 0.001 lies beyond both."""
    one, near, far = option("one", 750, 0.01), option("near", 700, 0.0104), option("far", 600, 0.02)
    assert not loses_less(one, near)
    assert loses_less(near, far)
    unknown = option("unknown", 600, 0.04, mean_kl_low=None, mean_kl_high=None)
    assert not loses_less(one, unknown)
    found = recommend([one, near, far, unknown], settings(prefer="quality"))
    assert found.option is one
    assert found.alike == (near, unknown)
    # A card more, or beyond the tolerance: not what it was chosen from.
    elsewhere = [option("near", 700, 0.0104, gpus=4), option("far", 600, 0.06)]
    assert recommend([one, *elsewhere], settings(prefer="quality")).alike == ()


def test_a_bend_that_the_texts_do_not_show_is_none() -> None:
    """The next smaller one may lose as little, for all that was measured."""
    bend, last = option("bend", 750, 0.01), option("last", 500, 0.1, mean_kl_low=0.0104)
    assert knee([bend, last], ORIGINAL) is None


def test_no_number_is_within_no_tolerance() -> None:
    """Every comparison with NaN is false."""
    broken = option("broken", 500, float("nan"), top1=float("nan"))
    assert misses(broken, Tolerance()) == ["mean_kl_nats", "worst_kl_nats", "top1_agreement"]


def test_an_interval_of_the_mean_beyond_its_tolerance_is_told() -> None:
    """0.049 × 1.05 = 0.0515 > 0.05."""
    assert recommend([option("a", 750, 0.049)], settings()).uncertain_mean
    assert not recommend([option("a", 750, 0.04)], settings()).uncertain_mean


SIZES = st.lists(
    st.tuples(st.integers(1, 999), st.floats(1e-4, 1.0)), min_size=1, max_size=12, unique=True
)


@given(SIZES)
def test_the_front_is_what_nobody_beats(sizes: list[tuple[int, float]]) -> None:
    """Against the definition: none outside is unbeaten, none inside is beaten."""
    options = [option(f"{i}", size, kl) for i, (size, kl) in enumerate(sizes)]
    kept = front(options)
    for one in options:
        beaten = any(
            o.total_bytes <= one.total_bytes
            and o.mean_kl <= one.mean_kl
            and (o.total_bytes, o.mean_kl) != (one.total_bytes, one.mean_kl)
            for o in options
        )
        assert beaten == (one not in kept)


def test_a_line_that_does_not_bend_has_no_knee() -> None:
    """Losses above the line from the original to the smallest: the end is no bend."""
    steep = [option("a", 800, 0.9), option("b", 600, 1.0)]
    assert front(steep) == steep
    assert knee(steep, ORIGINAL) is None
    found = knee([option("a", 800, 0.1), option("b", 600, 1.0)], ORIGINAL)
    assert found is not None
    assert found.name == "a"
