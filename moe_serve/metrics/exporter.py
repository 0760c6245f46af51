"""Our ``/metrics``: read at scrape time, so nothing is older than the scrape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from moe_serve.metrics.catalogue import CATALOGUE
from moe_serve.metrics.drift import SELECTIONS, Drift
from moe_serve.metrics.memory import process_tree, read_gpus, resident_bytes
from moe_serve.metrics.sources import Counts, Host, Source, buckets, total

_STATES: Final = ("idle", "shadow", "canary", "paused", "promoted", "rolled_back")
_HISTOGRAMS: Final = {
    "moe_serve_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "moe_serve_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "moe_serve_request_duration_seconds": "vllm:e2e_request_latency_seconds",
}


_TREE_SECONDS: Final = 30.0
"""For which the processes of an engine are taken to be the same."""
READ: Final = (
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    *_HISTOGRAMS.values(),
    "vllm:cache_config_info",
    SELECTIONS,
)
"""How those metrics of an engine begin that are read here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """One engine to report on."""

    variant: str
    pid: int | None
    weight_bytes: int
    """Of the checkpoint it serves."""
    kv_bytes_per_token: int
    source: Source
    drift: Drift | None = None
    """``None`` where it is not known what calibration selected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """What routes and record say at one moment; what can't be read is absent."""

    share: float | None = None
    """The pruned variant's, 0 to 1."""
    state: str | None = None
    decisions: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(decision, whose) → how many."""
    guards: tuple[int, Mapping[tuple[str, str], float]] | None = None
    """The step, and (guard, end) → difference; ``None`` while no rollout is under way."""
    quality: Mapping[str, tuple[int, float, float]] = field(default_factory=dict)
    """Domain → (probes answered, divergence in nats, agreement of the likeliest token)."""


@dataclass(kw_only=True, eq=False)
class Exporter(Collector):
    """Gathers everything once per scrape."""

    model: str
    engines: list[Watched]
    proxy: Counts
    recorded: Callable[[], Recorded]
    votes: Callable[[], Mapping[tuple[str, str], float]] = dict
    """(variant, good or bad) → votes."""
    expert_bytes: dict[tuple[str, str], int] = field(default_factory=dict)
    """(layer, kind) → bytes."""
    clock: Callable[[], float] = time.monotonic
    _pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(8, thread_name_prefix="scrape")
    )
    _trees: dict[int, tuple[float, list[int]]] = field(default_factory=dict)

    def describe(self) -> Iterator[Metric]:
        """The families, so that registering does not scrape."""
        yield from (_family(name) for name in CATALOGUE)

    def collect(self) -> Iterator[Metric]:
        """All families of the catalogue that there is data for."""
        families: dict[str, Any] = {name: _family(name) for name in CATALOGUE}
        # All at once: one that hangs must not make the scrape as long as all of them together.
        pages = [self._pool.submit(engine.source.read) for engine in self.engines]
        counted = self._pool.submit(self.proxy.read)
        self._record(families, self.recorded())
        for engine, page in zip(self.engines, pages, strict=True):
            self._engine(families, engine, page.result())
        self._requests(families, counted.result() or {})
        self._gpu(families)
        for (layer, kind), size in sorted(self.expert_bytes.items()):
            families["moe_serve_checkpoint_expert_bytes"].add_metric([layer, kind], size)
        ages = {source.name: source.age for source in (e.source for e in self.engines)}
        for name, age in {**ages, self.proxy.name: self.proxy.age}.items():
            families["moe_serve_input_age_seconds"].add_metric([name], age)
        yield from (family for family in families.values() if family.samples)

    def _engine(
        self, families: dict[str, Any], engine: Watched, samples: list[Sample] | None
    ) -> None:
        labels = [engine.variant, self.model]
        memory = families["moe_serve_engine_memory_bytes"]
        memory.add_metric([*labels, "weights"], engine.weight_bytes)
        if (rss := resident_bytes(self._tree(engine.pid))) is not None:
            memory.add_metric([*labels, "rss"], rss)
        if samples is None:
            return
        for kind in ("prompt", "generation"):
            if (count := total(samples, f"vllm:{kind}_tokens_total")) is not None:
                families["moe_serve_tokens_total"].add_metric([*labels, kind], count)
        for ours, theirs in _HISTOGRAMS.items():
            if (found := buckets(samples, theirs)) is not None:
                families[ours].add_metric(labels, buckets=found[0], sum_value=found[1])
        for layer, moved in (engine.drift.look(samples) if engine.drift else {}).items():
            families["moe_serve_routing_drift_ratio"].add_metric([*labels, layer], moved)
        if (capacity := _cache_tokens(samples)) is not None:
            families["moe_serve_kv_cache_capacity_tokens"].add_metric(labels, capacity)
            memory.add_metric([*labels, "kv_cache"], capacity * engine.kv_bytes_per_token)

    def _tree(self, pid: int | None) -> list[int]:
        """Finding it means reading about every process of the machine, and it seldom changes."""
        if pid is None:
            return []
        now = self.clock()
        found, members = self._trees.get(pid, (0.0, []))
        if not members or now - found > _TREE_SECONDS:
            members = process_tree(pid)
            self._trees[pid] = (now, members)
        return members

    def _gpu(self, families: dict[str, Any]) -> None:
        trees = {e.variant: set(self._tree(e.pid)) for e in self.engines}
        for gpu in read_gpus():
            identity = [gpu.index, gpu.uuid]
            families["moe_serve_gpu_memory_total_bytes"].add_metric(identity, gpu.total)
            for variant, members in trees.items():
                # An engine elsewhere, or gone, has no processes: that is not zero bytes.
                if members and (used := gpu.used_by(members)) is not None:
                    families["moe_serve_gpu_memory_used_bytes"].add_metric(
                        [*identity, variant], used
                    )

    def _record(self, families: dict[str, Any], found: Recorded) -> None:
        if found.share is not None:
            for engine in self.engines:
                ratio = found.share if engine.variant == "pruned" else 1.0 - found.share
                families["moe_serve_traffic_weight_ratio"].add_metric(
                    [engine.variant, self.model], ratio
                )
        if found.state is not None:
            for name in _STATES:
                families["moe_serve_rollout_state"].add_metric([name], float(name == found.state))
        for (decision, reason), count in found.decisions.items():
            families["moe_serve_rollout_decisions_total"].add_metric([decision, reason], count)
        if found.guards is not None:
            step, ends = found.guards
            families["moe_serve_rollout_step"].add_metric([], step)
            for (guard, bound), value in ends.items():
                families["moe_serve_guard_difference"].add_metric([guard, bound], value)
        for domain, (probes, kl, agreement) in found.quality.items():
            families["moe_serve_quality_probes"].add_metric([domain], probes)
            families["moe_serve_quality_kl_nats"].add_metric([domain], kl)
            families["moe_serve_quality_top1_agreement_ratio"].add_metric([domain], agreement)
        for (variant, verdict), number in self.votes().items():
            families["moe_serve_feedback_total"].add_metric([variant, verdict], number)

    def _requests(self, families: dict[str, Any], counts: Mapping[str, Host]) -> None:
        for engine in self.engines:
            host = counts.get(engine.variant)
            for outcome, count in (host.outcomes() if host else {}).items():
                families["moe_serve_requests_total"].add_metric(
                    [engine.variant, self.model, outcome], count
                )


def _family(name: str) -> Any:
    metric = CATALOGUE[name]
    kinds: dict[str, Any] = {
        "gauge": GaugeMetricFamily,
        "counter": CounterMetricFamily,
        "histogram": HistogramMetricFamily,
    }
    return kinds[metric.kind](metric.name, metric.help, labels=metric.labels)


def _cache_tokens(samples: list[Sample]) -> int | None:
    """KV-cache capacity from vLLM's ``cache_config_info``."""
    for sample in samples:
        if sample.name == "vllm:cache_config_info":
            try:
                size = int(sample.labels["num_gpu_blocks"]) * int(sample.labels["block_size"])
            except (KeyError, ValueError):
                continue
            return size
    return None
