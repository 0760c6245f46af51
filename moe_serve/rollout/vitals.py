"""Both variants side by side, over the last minutes: what the page and the API show of engines.

Made from our own metrics, so that page, dashboards and guards never tell different stories.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from prometheus_client.core import Metric

from moe_serve.rollout import schema
from moe_serve.serving.variants import VARIANTS

_SPAN: Final = 300.0
"""Seconds that rates look back."""
_QUALITY: Final = "moe_serve_quality_"

Key = tuple[str, str, str]
"""(metric, variant, its kind, outcome or upper edge)."""


class Collects(Protocol):
    """Gives metrics, as the exporter does."""

    def collect(self) -> Iterable[Metric]:
        """All families now."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    tick: float
    values: Mapping[Key, float]
    quality: Mapping[str, Mapping[str, float]]
    answers: frozenset[str]


class Watch:
    """Looks at the metrics now and then, and remembers some minutes of it."""

    def __init__(self, source: Collects, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is asked before :meth:`look`."""
        self._source, self._clock = source, clock
        self._looks: deque[_Look] = deque()
        self._lock = threading.Lock()

    def look(self) -> None:
        """Ask the engines; takes seconds where one hangs."""
        now = self._clock()
        found = _look(self._source.collect(), now)
        with self._lock:
            self._looks.append(found)
            while len(self._looks) > 1 and now - self._looks[0].tick > _SPAN:
                self._looks.popleft()

    def known(self) -> schema.Variants:
        """What is known now. Nobody is asked, so that no engine holds up a page."""
        with self._lock:
            if not self._looks:
                return _NOTHING
            first, last = self._looks[0], self._looks[-1]
        return schema.Variants(
            seconds=last.tick - first.tick,
            variants=[_vitals(first, last, variant) for variant in VARIANTS],
            quality={name: dict(domains) for name, domains in last.quality.items()},
        )


def _look(families: Iterable[Metric], tick: float) -> _Look:
    values: dict[Key, float] = {}
    quality: dict[str, dict[str, float]] = {}
    for family in families:
        for sample in family.samples:
            labels = sample.labels
            if sample.name.startswith(_QUALITY) and "domain" in labels:
                name = sample.name.removeprefix(_QUALITY)
                quality.setdefault(name, {})[labels["domain"]] = sample.value
            elif "variant" in labels:
                which = labels.get("kind") or labels.get("outcome") or labels.get("le") or ""
                key = (sample.name, labels["variant"], which)
                values[key] = values.get(key, 0.0) + sample.value
    answers = {v for name, v, _ in values if name == "moe_serve_tokens_total"}
    return _Look(tick=tick, values=values, quality=quality, answers=frozenset(answers))


def _vitals(first: _Look, last: _Look, variant: str) -> schema.Vitals:
    def now(name: str, which: str = "") -> float | None:
        return last.values.get((f"moe_serve_{name}", variant, which))

    def grown(name: str, which: str) -> float | None:
        key = (f"moe_serve_{name}", variant, which)
        before, after = first.values.get(key), last.values.get(key)
        # A counter that fell is an engine that began anew.
        if before is None or after is None or after < before:
            return None
        return after - before

    seconds = last.tick - first.tick
    answered, failed = (grown("requests_total", o) for o in ("answered", "failed"))
    requests = None if answered is None or failed is None else answered + failed
    tokens = grown("tokens_total", "generation")
    gpu = now("gpu_memory_used_bytes")
    memory = {kind: now("engine_memory_bytes", kind) for kind in ("weights", "kv_cache", "rss")}
    return schema.Vitals(
        variant=variant,
        answers=variant in last.answers,
        weight_bytes=memory["weights"],
        cache_bytes=memory["kv_cache"],
        cache_tokens=now("kv_cache_capacity_tokens"),
        held_bytes=gpu if gpu is not None else memory["rss"],
        requests_per_second=_rate(requests, seconds),
        generated_per_second=_rate(tokens, seconds),
        failed_share=failed / requests if failed is not None and requests else None,
        first_token=_latency(first, last, variant, "moe_serve_time_to_first_token_seconds"),
        between_tokens=_latency(first, last, variant, "moe_serve_inter_token_latency_seconds"),
    )


def _rate(grown: float | None, seconds: float) -> float | None:
    return grown / seconds if grown is not None and seconds > 0.0 else None


def _latency(first: _Look, last: _Look, variant: str, name: str) -> schema.Latency | None:
    edges = []
    for (found, whose, edge), count in last.values.items():
        if found == f"{name}_bucket" and whose == variant:
            edges.append((float(edge), count - first.values.get((found, whose, edge), 0.0)))
    edges.sort()
    if not edges or edges[-1][1] <= 0.0 or any(count < 0.0 for _, count in edges):
        return None
    return schema.Latency(p50=quantile(edges, 0.5), p95=quantile(edges, 0.95))


def quantile(edges: list[tuple[float, float]], share: float) -> float:
    """Of a histogram, evenly spread between its edges; the last finite edge at most.

    Args:
        edges: (upper edge, cumulative count), rising; at least one observation.
        share: 0 to 1.
    """
    wanted = share * edges[-1][1]
    low, below = 0.0, 0.0
    for edge, count in edges:
        if count >= wanted and count > below:
            if math.isinf(edge):
                return low
            return low + (edge - low) * (wanted - below) / (count - below)
        low, below = edge, count
    return low


_EMPTY: Final = _Look(tick=0.0, values={}, quality={}, answers=frozenset())
_NOTHING: Final = schema.Variants(
    seconds=0.0,
    variants=[_vitals(_EMPTY, _EMPTY, variant) for variant in VARIANTS],
    quality={},
)
