"""Where a reading comes from: this machine's engines and proxy, or a Prometheus server.

Counters stay cumulative: differences are the window's, which knows what a restart is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, Protocol

import httpx

from moe_serve.metrics.sources import (
    OUTCOMES,
    Counts,
    Endpoints,
    EngineCounts,
    Host,
    Source,
    buckets,
    total,
)
from moe_serve.rollout.margins import Metric
from moe_serve.rollout.policy import Policy, Prometheus
from moe_serve.rollout.reading import ArmReading, Reading
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import VARIANTS

_COUNTED: Final = "moe_serve_requests_total"
_STARTED: Final = "process_start_time_seconds"
TOKENS: Final = "vllm:request_generation_tokens"
ENDED: Final = "vllm:request_success_total"
_CUT_SHORT: Final = ("length", "repetition")
_WHOLE: Final = "stop"
"""Reasons for an answer's end; what a client or an error broke off is neither."""
HISTOGRAMS: Final[Mapping[Metric, str]] = {
    "ttft": "vllm:time_to_first_token_seconds",
    # The mean of a request: single gaps between its tokens are correlated with each other.
    "tpot": "vllm:request_time_per_output_token_seconds",
}
_STALE: Final = 60.0
"""Seconds after which a Prometheus sample is no longer of now."""

Over = tuple[float, float]
"""(requests over the objective, requests)."""


class Sources(Protocol):
    """Gives readings; what can't be read is ``None`` in them, never zero."""

    def read(self, policy: Policy) -> Reading:
        """One reading now."""
        ...


def over_edge(counts: list[tuple[str, float]], objective: float) -> tuple[Over, float] | None:
    """Requests over the histogram edge nearest to an objective (by ratio), and the edge.

    Args:
        counts: cumulative (edge, count), rising, the last one infinite.
        objective: seconds.
    """
    edges = [(float(edge), count) for edge, count in counts]
    finite = [(edge, count) for edge, count in edges if 0.0 < edge < math.inf]
    if not finite or not math.isinf(edges[-1][0]):
        return None
    edge, below = min(finite, key=lambda item: abs(math.log(item[0] / objective)))
    return (edges[-1][1] - below, edges[-1][1]), edge


class DirectSources:
    """Asks the engines' ``/metrics``, and Envoy's admin interface where Envoy is ours."""

    def __init__(self, stack: StackState) -> None:
        """For a stack on this machine."""
        self._engines = {
            name: Source(name=name, url=f"{engine.url}/metrics")
            for name, engine in stack.engines.items()
        }
        self._proxy = counts_of(stack)
        self._at_engines = stack.http_route is not None

    def read(self, policy: Policy) -> Reading:
        """Engines one after the other, then the proxy."""
        edges: dict[str, float] = {}
        found = {name: self._engines[name].read() for name in VARIANTS}
        hosts = self._proxy.read() or {}
        arms = {
            name: replace(
                _arm(samples or [], hosts.get(name), policy, edges),
                counts_probes=self._at_engines,
            )
            for name, samples in found.items()
        }
        return Reading(at=time.time(), tick=time.monotonic(), arms=arms, edges=edges)


def _arm(
    samples: list[Any], host: Host | None, policy: Policy, edges: dict[str, float]
) -> ArmReading:
    over: dict[str, Over] = {}
    for metric, guard in policy.guards.latency().items():
        counts = buckets(samples, HISTOGRAMS[metric])
        if counts and (found := over_edge(counts[0], guard.objective)):
            over[metric], edges[metric] = found
    requests, failed = _requests(host)
    started = total(samples, _STARTED)
    return ArmReading(
        requests=requests,
        failed=failed,
        over=over,
        shares=_shares(samples, edges) | _abandoned(host),
        running=total(samples, "vllm:num_requests_running"),
        waiting=total(samples, "vllm:num_requests_waiting"),
        kv_usage=total(samples, "vllm:kv_cache_usage_perc"),
        healthy=host.healthy if host else None,
        engines={} if started is None else {"": started},
    )


def _shares(samples: list[Any], edges: dict[str, float]) -> dict[str, Over]:
    """(cut short, answers) and (at most one token, answers)."""
    found: dict[str, Over] = {}
    ends = {r: total(samples, ENDED, finished_reason=r) for r in (*_CUT_SHORT, _WHOLE)}
    if ends["length"] is not None and ends[_WHOLE] is not None:
        known = {reason: count or 0.0 for reason, count in ends.items()}
        found["truncated"] = (sum(known[r] for r in _CUT_SHORT), sum(known.values()))
    counts = buckets(samples, TOKENS)
    if counts and (longer := over_edge(counts[0], 1.0)):
        (more, answers), edges["empty"] = longer
        found["empty"] = (answers - more, answers)
    return found


def _abandoned(host: Host | None) -> dict[str, Over]:
    """(abandoned, requests), by the proxy."""
    if host is None or host.abandoned is None:
        return {}
    return {"abandoned": (host.abandoned, host.sent)}


def _requests(host: Host | None) -> tuple[float | None, float | None]:
    """(all, failed); one cut off before its headers counts as failed and cut: as one at most."""
    if host is None:
        return None, None
    requests = host.answered + host.failed
    return requests, min(requests, host.failed + host.cut)


class PrometheusSources:
    """Asks a Prometheus server; sums over all engines of a variant."""

    def __init__(
        self,
        settings: Prometheus,
        client: httpx.Client | None = None,
        *,
        at_engines: bool = False,
    ) -> None:
        """Every series must carry the label ``variant``.

        Args:
            settings: where it is.
            client: to ask it.
            at_engines: requests are counted there, and not at a proxy.
        """
        self._at_engines = at_engines
        self._url = f"{settings.prometheus.rstrip('/')}/api/v1/query"
        self._more = f",{settings.selector}" if settings.selector else ""
        self._client = client or httpx.Client(timeout=5.0)
        self._silent = False

    def read(self, policy: Policy) -> Reading:
        """Some ten instant queries per variant."""
        self._silent = False
        edges: dict[str, float] = {}
        arms = {name: self._arm(name, policy, edges) for name in VARIANTS}
        return Reading(at=time.time(), tick=time.monotonic(), arms=arms, edges=edges)

    def _arm(self, variant: str, policy: Policy, edges: dict[str, float]) -> ArmReading:
        labels = f'variant="{variant}"{self._more}'
        over: dict[str, Over] = {}
        for metric, guard in policy.guards.latency().items():
            query = f"sum by (le) ({HISTOGRAMS[metric]}_bucket{{{labels}}})"
            counts = [(row["metric"]["le"], value) for row, value in self._ask(query)]
            counts.sort(key=lambda item: float(item[0]))
            if counts and (found := over_edge(counts, guard.objective)):
                over[metric], edges[metric] = found
        shares = self._shares(labels, edges)
        age = self._one(f"time() - max(timestamp({_COUNTED}{{{labels}}}))")
        proxies = self._ask(f"{_COUNTED}{{{labels}}}")
        of = {
            outcome: [v for row, v in proxies if row["metric"].get("outcome") == outcome]
            for outcome in OUTCOMES
        }
        known = age is not None and age <= _STALE and of["answered"] and of["failed"]
        counted = sum(of["answered"]) + sum(of["failed"])
        failed = min(counted, sum(of["failed"]) + sum(of["cut"]))
        if known and of["abandoned"] and of["sent"]:
            shares["abandoned"] = (sum(of["abandoned"]), sum(of["sent"]))
        engines = {_whose(row): value for row, value in self._ask(f"{_STARTED}{{{labels}}}")}
        running = self._ask(f"vllm:num_requests_running{{{labels}}}")
        return ArmReading(
            requests=counted if known else None,
            failed=failed if known else None,
            over=over,
            shares=shares,
            # Of one engine: the load that a request meets.
            running=sum(v for _, v in running) / len(running) if running else None,
            waiting=self._one(f"sum(vllm:num_requests_waiting{{{labels}}})"),
            kv_usage=self._one(f"min(vllm:kv_cache_usage_perc{{{labels}}})"),
            counts_probes=self._at_engines,
            engines=engines,
            parts=frozenset([*engines, *(_whose(row) for row, _ in (*running, *proxies))]),
        )

    def _shares(self, labels: str, edges: dict[str, float]) -> dict[str, Over]:
        """As :func:`_shares` of one engine."""
        found: dict[str, Over] = {}
        rows = self._ask(f"sum by (finished_reason) ({ENDED}{{{labels}}})")
        ends = {row["metric"].get("finished_reason", ""): value for row, value in rows}
        if "length" in ends and _WHOLE in ends:
            cut = sum(ends.get(reason, 0.0) for reason in _CUT_SHORT)
            found["truncated"] = (cut, cut + ends[_WHOLE])
        rows = self._ask(f"sum by (le) ({TOKENS}_bucket{{{labels}}})")
        counts = [(row["metric"]["le"], value) for row, value in rows]
        counts.sort(key=lambda item: float(item[0]))
        if counts and (longer := over_edge(counts, 1.0)):
            (more, answers), edges["empty"] = longer
            found["empty"] = (answers - more, answers)
        return found

    def _one(self, query: str) -> float | None:
        rows = self._ask(query)
        return rows[0][1] if len(rows) == 1 else None

    def _ask(self, query: str) -> list[tuple[dict[str, Any], float]]:
        """Rows of an instant query; none when it can't be asked.

        Who did not answer one query is not asked another in the same reading: twenty times the
        time-out is longer than a lease, and than a rollback may wait.
        """
        if self._silent:
            return []
        try:
            answer = self._client.get(self._url, params={"query": query}).raise_for_status().json()
            return [(row, float(row["value"][1])) for row in answer["data"]["result"]]
        except httpx.TransportError:
            self._silent = True
            return []
        except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError):
            return []


def _whose(row: Mapping[str, Any]) -> str:
    """A series by its labels, whatever it counts."""
    return ",".join(f"{k}={v}" for k, v in sorted(row["metric"].items()) if k != "__name__")


def sources_of(policy: Policy, stack: StackState) -> Sources:
    """As the policy says."""
    if isinstance(policy.metrics, Prometheus):
        return PrometheusSources(policy.metrics, at_engines=stack.http_route is not None)
    return DirectSources(stack)


def counts_of(stack: StackState) -> Counts:
    """Who counts a stack's requests."""
    if stack.http_route is not None:
        return EngineCounts({name: engine.url for name, engine in stack.engines.items()})
    return Endpoints(name="envoy", url=f"http://{stack.admin}/clusters?format=json")
