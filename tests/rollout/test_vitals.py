"""Rates and latencies from cumulative metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from moe_serve.rollout.vitals import Watch, quantile


class Made:
    """Metrics as a test wants them."""

    def __init__(self) -> None:
        self.tokens, self.failed, self.slow = 0.0, 0.0, 0.0

    def collect(self) -> Iterable[Metric]:
        """Of the pruned variant alone; the original does not answer."""
        tokens = CounterMetricFamily("moe_serve_tokens", "", labels=("variant", "kind"))
        tokens.add_metric(["pruned", "generation"], self.tokens)
        requests = CounterMetricFamily("moe_serve_requests", "", labels=("variant", "outcome"))
        requests.add_metric(["pruned", "answered"], self.tokens)
        requests.add_metric(["pruned", "failed"], self.failed)
        first = HistogramMetricFamily(
            "moe_serve_time_to_first_token_seconds", "", labels=("variant",)
        )
        buckets = [("1.0", self.tokens), ("2.0", self.tokens + self.slow)]
        first.add_metric(["pruned"], [*buckets, ("+Inf", self.tokens + self.slow)], 0.0)
        memory = GaugeMetricFamily("moe_serve_engine_memory_bytes", "", labels=("variant", "kind"))
        for kind, held in (("weights", 7.0), ("kv_cache", 2.0), ("rss", 11.0)):
            memory.add_metric(["pruned", kind], held)
        quality = GaugeMetricFamily("moe_serve_quality_kl_nats", "", labels=("domain",))
        quality.add_metric(["code"], 0.02)
        return [tokens, requests, first, memory, quality]


def test_rates_are_differences_over_the_time_between() -> None:
    """300 tokens and 100 failures in 10 s: 30 and 40 a second, a quarter failed."""
    made, now = Made(), 0.0
    watch = Watch(made, lambda: now)
    assert [v.answers for v in watch.known().variants] == [False, False]
    watch.look()
    pruned = watch.known().variants[1]
    assert (pruned.generated_per_second, pruned.failed_share, pruned.first_token) == (None,) * 3
    made.tokens, made.failed, now = 300.0, 100.0, 10.0
    watch.look()
    found = watch.known()
    original, pruned = found.variants
    assert (original.answers, pruned.answers, found.seconds) == (False, True, 10.0)
    assert original.generated_per_second is None
    assert pruned.generated_per_second == 30.0
    assert pruned.requests_per_second == 40.0
    assert pruned.failed_share == 0.25
    assert pruned.first_token is not None
    assert (pruned.first_token.p50, pruned.first_token.p95) == (0.5, 0.95)
    # Without a GPU, what a process holds is its resident memory.
    assert (pruned.weight_bytes, pruned.cache_bytes, pruned.held_bytes) == (7.0, 2.0, 11.0)
    assert (original.weight_bytes, original.held_bytes) == (None, None)
    assert found.quality == {"kl_nats": {"code": 0.02}}


def test_an_engine_that_began_anew_has_no_rate() -> None:
    """A counter that fell is no negative traffic."""
    made, now = Made(), 0.0
    watch = Watch(made, lambda: now)
    made.tokens = 50.0
    watch.look()
    made.tokens, now = 10.0, 10.0
    watch.look()
    pruned = watch.known().variants[1]
    assert (pruned.generated_per_second, pruned.first_token) == (None, None)


class Late(Made):
    """The original's requests are counted by the proxy; the pruned engine starts between looks."""

    started = False

    def collect(self) -> Iterable[Metric]:
        """Counters and histogram once it has."""
        requests = CounterMetricFamily("moe_serve_requests", "", labels=("variant", "outcome"))
        requests.add_metric(["original", "answered"], 5.0)
        return [requests, *(super().collect() if self.started else ())]


def test_a_variant_answers_once_its_own_engine_does() -> None:
    """Requests are the proxy's counters; a histogram that was not there yet began at nothing."""
    made, now = Late(), 0.0
    watch = Watch(made, lambda: now)
    watch.look()
    made.started, made.tokens, now = True, 8.0, 10.0
    watch.look()
    original, pruned = watch.known().variants
    assert (original.answers, pruned.answers) == (False, True)
    assert pruned.first_token is not None
    assert pruned.first_token.p50 == 0.5


@pytest.mark.parametrize(
    ("share", "expected"), [(0.25, 0.5), (0.5, 1.0), (0.75, 2.0), (0.9, 3.0), (1.0, 3.0)]
)
def test_quantiles_lie_between_edges(share: float, expected: float) -> None:
    """4 up to 1 s, 2 more up to 2 s, none up to 3 s, 2 beyond: at most the last finite edge."""
    edges = [(1.0, 4.0), (2.0, 6.0), (3.0, 6.0), (math.inf, 8.0)]
    assert quantile(edges, share) == expected
