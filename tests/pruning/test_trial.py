"""Which tokens a trial takes."""

from __future__ import annotations

import numpy as np

from moe_serve.calibration.sequences import Sequences
from moe_serve.pruning.trial import trial_share


def sequences(domains: int, each: int, length: int) -> Sequences:
    """So many sequences per domain, their tokens numbered."""
    names = tuple(f"d{n}" for n in range(domains))
    count = domains * each
    rows = np.arange(count * length, dtype=np.int64).reshape(count, length)
    return Sequences(
        domains=names, tokens=tuple(rows), domain=tuple(np.repeat(range(domains), each).tolist())
    )


def test_long_sequences_are_cut_so_that_every_domain_measures() -> None:
    """7 domains of 8 x 1,024 tokens: pieces of 16,384 / (8 · 7) = 292, every second one of them."""
    share = trial_share(sequences(7, 8, 1024))
    assert max(map(len, share.tokens)) == 292
    assert 0.8 * 16_384 < share.total < 1.5 * 16_384
    measured_T = share.held_out(0.25)
    assert set(share.token_domains()[measured_T].tolist()) == set(range(7))
    whole = np.concatenate(share.tokens)
    assert len(np.unique(whole)) == len(whole)


def test_short_sequences_stay_whole() -> None:
    """2 domains of 100 x 256 tokens: every third of 51,200 / 16,384."""
    given = sequences(2, 100, 256)
    share = trial_share(given)
    assert [len(tokens) for tokens in share.tokens] == [256] * (2 * 34)
    assert np.array_equal(share.tokens[1], given.tokens[3])


def test_every_domain_with_two_sequences_has_one_held_out() -> None:
    """A fifth of 1, 2, 4, 5, 8 and 10: none, then 1, 1, 1, 2, 2, always the last among them."""
    for each, held in ((1, 0), (2, 1), (4, 1), (5, 1), (8, 2), (10, 2)):
        given = sequences(2, each, 3)
        mask = given.held_out(0.2).view(2, each, 3)
        assert mask[:, :, 0].sum(dim=1).tolist() == [held, held]
        assert bool((mask == mask[:, :, :1]).all())
        assert not held or mask[:, -1].all()
