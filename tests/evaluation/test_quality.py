"""Intervals per domain: how often they hold what they are for."""

from __future__ import annotations

import numpy as np
import pytest

from moe_serve.calibration.sequences import Sequences
from moe_serve.evaluation.quality import (
    DomainQuality,
    Estimate,
    Estimates,
    Figures,
    Floats,
    by_domain,
)

TOKENS = 255
NAMES = ("kl_nats", "perplexity_ratio", "top1_agreement")


def domain(rng: np.random.Generator, count: int) -> tuple[list[Floats], Figures]:
    """Documents whose loss is log-normal with a spread of a half, and what their mean is.

    KL per token is m = e^(-2.3 + z / 2): its mean is e^(-2.3 + 1/8). Four fifths of it turn other
    words up and four fifths of it add to the loss, each with noise of its own.
    """
    m = np.exp(rng.normal(-2.3, 0.5, count))
    agree = (1 - 0.8 * m + rng.normal(0, 0.02, count)).clip(0, 1)
    more = 0.8 * m + rng.normal(0, 0.03, count)
    found = [
        np.tile([k, a, 3.5, 3.5 + x], (TOKENS, 1)) for k, a, x in zip(m, agree, more, strict=True)
    ]
    mean = float(np.exp(-2.3 + 0.125))
    true = Figures(
        kl_nats=mean, perplexity_ratio=float(np.exp(0.8 * mean)), top1_agreement=1 - 0.8 * mean
    )
    return found, true


def measured(values: list[Floats], documents: tuple[Floats, ...] = ()) -> DomainQuality:
    """As one domain; each sequence a document unless told otherwise."""
    ids = tuple(np.zeros(len(rows) + 1, dtype=np.int64) for rows in values)
    sequences = Sequences(
        domains=("d",),
        tokens=ids,
        domain=(0,) * len(values),
        documents=tuple(rows.astype(np.int64) for rows in documents),
    )
    return by_domain(sequences, values)["d"]


def hits(found: tuple[Figures, Figures] | None, true: Figures) -> list[bool]:
    """Which figures' intervals hold the truth."""
    assert found is not None
    low, high = found
    return [getattr(low, n) <= getattr(true, n) <= getattr(high, n) for n in NAMES]


@pytest.mark.parametrize("count", [4, 8, 16, 64])
def test_intervals_cover_what_they_say(count: int) -> None:
    """Of 3,000 domains 93 to 97 % hold the true value; 0.4 % is one standard error of that."""
    rng = np.random.default_rng(count)
    found = []
    for _ in range(3000):
        values, true = domain(rng, count)
        found.append(hits(measured(values).interval, true))
    shares = np.mean(found, axis=0)
    assert ((shares >= 0.93) & (shares <= 0.97)).all(), shares


@pytest.mark.parametrize("sizes", [(4, 4, 4), (3, 8, 16)])
def test_the_mean_over_domains_covers_too(sizes: tuple[int, ...]) -> None:
    """Each weighs the same, however many documents it has; of three, 93 % are what can be had."""
    rng = np.random.default_rng(sum(sizes))
    found = []
    for _ in range(2000):
        parts = [measured(domain(rng, size)[0]).estimates for size in sizes]
        _, true = domain(rng, 1)
        found.append(hits(Estimates.average([p for p in parts if p is not None]).interval, true))
    shares = np.mean(found, axis=0)
    assert ((shares >= 0.92) & (shares <= 0.985)).all(), shares


def test_documents_vary_and_not_the_sequences_they_are_packed_into() -> None:
    """Four documents in sixteen sequences, each a quarter of every one: the sequences are alike.

    Intervals over sequences would have no width; those over documents hold the mean.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(1000):
        values, true = domain(rng, 4)
        mixed = np.concatenate([rows[:16] for rows in values])
        owner = np.repeat(np.arange(4), 16)
        quality = measured([mixed] * 16, (np.concatenate([[0], owner]),) * 16)
        assert quality.documents == 4
        found.append(hits(quality.interval, true))
    shares = np.mean(found, axis=0)
    assert (shares >= 0.92).all(), shares


def test_one_document_has_no_interval() -> None:
    """It says nothing of how others vary, however many sequences it fills."""
    values, _ = domain(np.random.default_rng(0), 1)
    assert measured(values).interval is None
    whole = (np.zeros(TOKENS + 1),) * 5
    assert measured(values * 5, whole).interval is None


def test_no_difference_has_no_width() -> None:
    """A model and itself: nothing, and nothing to be unsure of."""
    found = measured([np.tile([0.0, 1.0, 0.8, 0.8], (9, 1))] * 5)
    nothing = Figures(kl_nats=0.0, perplexity_ratio=1.0, top1_agreement=1.0)
    assert found.figures == nothing
    assert found.interval == (nothing, nothing)
    assert found.estimates is not None
    assert Estimates.average([found.estimates] * 2).interval == (nothing, nothing)


def test_a_model_that_is_wrong_beyond_measure_has_figures() -> None:
    """A thousand nats a token: its exponential is none, and JSON knows no infinity."""
    rows = [np.tile([900.0 + n, 0.0, 1.0, 1001.0 + n], (9, 1)) for n in range(3)]
    found = measured(rows)
    assert found.interval is not None
    every = [found.figures, *found.interval]
    assert all(
        np.isfinite(getattr(f, name)) and f.perplexity_ratio > 0 for f in every for name in NAMES
    )


def test_an_average_by_hand() -> None:
    """Errors 3 and 4: √(9 + 16) / 2; freedom 25² / (81 / 2 + 256 / 4)."""
    one, other = (Estimate(mean=m, error=e, freedom=f) for m, e, f in ((1, 3, 2), (3, 4, 4)))
    found = Estimate.average([one, other])
    assert (found.mean, found.error) == (2, 2.5)
    assert found.freedom == pytest.approx(625 / (40.5 + 64))
