"""What engines and proxy say, parsed; a source that does not answer is absent, with its age."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from moe_serve.metrics.asking import CONNECTIONS


@dataclass(kw_only=True, slots=True)
class _Asked:
    """An address that may or may not answer."""

    name: str
    url: str
    answered_at: float | None = None
    """Monotonic seconds of the last answer."""
    began: float = field(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        """Seconds since it last answered, or since it was first asked."""
        return time.monotonic() - (self.answered_at or self.began)


@dataclass(kw_only=True, slots=True)
class Source(_Asked):
    """Prometheus text."""

    keep: tuple[str, ...] = ()
    """How the names begin that are wanted; empty: all. Reading the rest would cost the most."""

    def read(self, timeout: float = 2.0) -> list[Sample] | None:
        """The samples, or ``None`` when it does not answer in the format."""
        try:
            text = CONNECTIONS.get(self.url, timeout).decode()
            if self.keep:
                begins = (*self.keep, *(f"# TYPE {name}" for name in self.keep))
                text = "\n".join(ln for ln in text.split("\n") if ln.startswith(begins)) + "\n"
            families = list(text_string_to_metric_families(text))
        except (OSError, ValueError):
            return None
        self.answered_at = time.monotonic()
        return [sample for family in families for sample in family.samples]


OUTCOMES: Final = ("answered", "failed", "cut", "abandoned", "sent")
"""What requests are counted by, of :class:`Host` and of ``moe_serve_requests_total``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What the proxy knows of one engine; counts are of attempts and cumulative."""

    answered: int
    """Response headers with a status below 500, whatever became of the body."""
    failed: int
    """500 and above, resets and time-outs before the headers."""
    cut: int
    """Connections that the engine closed while a request was in flight: streams cut off after
    their headers, which count as answered too, and resets before them, which are failed too."""
    abandoned: int | None
    """Connections that the proxy closed while a request was in flight: its client had gone, or it
    took longer than the proxy waits, or the answer was no HTTP. Those whose headers were there
    count as answered too. ``None``: not known."""
    sent: int
    """All that were sent over a connection, also those that were abandoned before the headers."""
    healthy: bool

    def outcomes(self) -> dict[str, int]:
        """Outcome → requests."""
        counts = {name: getattr(self, name) for name in OUTCOMES}
        return {name: count for name, count in counts.items() if count is not None}


class Counts(Protocol):
    """Counts requests by who answered: the proxy, or the engines themselves."""

    @property
    def name(self) -> str:
        """Of the source, for its age."""
        ...

    @property
    def age(self) -> float:
        """Seconds since it last answered."""
        ...

    def read(self) -> dict[str, Host] | None:
        """Variant → what is known; ``None`` when it does not answer."""
        ...


class EngineCounts:
    """Requests as the engines count them, where the proxy is not ours to ask.

    vLLM counts answers by class of status. What never reached an engine it does not know, nor that
    a stream broke off: ``cut`` stays 0, and an engine that does not answer is unhealthy, its
    counts as they last were. Nor whether a client went away.
    """

    name: Final = "gateway"

    def __init__(self, urls: Mapping[str, str]) -> None:
        """Variant → address of an engine."""
        self._sources = {v: Source(name=v, url=f"{url}/metrics") for v, url in urls.items()}
        self._last: dict[str, Host] = {}

    @property
    def age(self) -> float:
        """Of the engine that is silent longest."""
        return max(source.age for source in self._sources.values())

    def read(self) -> dict[str, Host] | None:
        """Variant → counts; one that never answered is absent."""
        for variant, source in self._sources.items():
            if (samples := source.read()) is not None:
                self._last[variant] = _counted(samples)
            elif variant in self._last:
                self._last[variant] = replace(self._last[variant], healthy=False)
        return dict(self._last) or None


def _counted(samples: list[Sample]) -> Host:
    found = {"failed": 0, "answered": 0}
    for sample in samples:
        if sample.name == _HTTP and sample.labels.get("handler") in _HANDLERS:
            outcome = "failed" if sample.labels.get("status", "").startswith("5") else "answered"
            found[outcome] += int(sample.value)
    return Host(**found, cut=0, abandoned=None, sent=sum(found.values()), healthy=True)


_HTTP: Final = "http_requests_total"
_HANDLERS: Final = ("/v1/completions", "/v1/chat/completions")


class Endpoints(_Asked):
    """Envoy's ``/clusters``: requests per endpoint, whichever route led there."""

    def read(self, timeout: float = 2.0) -> dict[str, Host] | None:
        """Cluster → its one host; ``None`` when Envoy does not answer.

        Statistics by cluster would charge a request to the route's cluster, not to who answered;
        only connections are counted by the cluster that they lead to.
        """
        admin = self.url.rsplit("/", 1)[0]
        try:
            clusters = json.loads(CONNECTIONS.get(self.url, timeout))["cluster_statuses"]
            url = f"{admin}/stats?filter={_CLOSED.format(by='(remote|local)')}$&format=json"
            closed = json.loads(CONNECTIONS.get(url, timeout))["stats"]
            found = {s["name"]: int(s["value"]) for s in closed if "name" in s}
            counts = {
                name: _host(
                    host,
                    cut=found[f"cluster.{name}.{_CLOSED.format(by='remote')}"],
                    abandoned=found[f"cluster.{name}.{_CLOSED.format(by='local')}"],
                )
                for name, hosts in ((c["name"], c.get("host_statuses", ())) for c in clusters)
                for host in hosts
            }
        except (OSError, ValueError, KeyError, TypeError):
            return None
        self.answered_at = time.monotonic()
        return counts


_CLOSED: Final = "upstream_cx_destroy_{by}_with_active_rq"
"""By the engine or by the proxy."""


def _host(host: dict[str, Any], *, cut: int, abandoned: int) -> Host:
    stats = {stat["name"]: int(stat.get("value", 0)) for stat in host["stats"]}
    ill = host.get("health_status", {})
    return Host(
        answered=stats["rq_success"],
        failed=stats["rq_error"],
        cut=cut,
        abandoned=abandoned,
        sent=stats["rq_total"],
        healthy=not (ill.get("failed_active_health_check") or ill.get("failed_outlier_check")),
    )


def total(samples: Iterable[Sample], name: str, **labels: str) -> float | None:
    """Sum over samples of a name with these labels; ``None`` when there is none."""
    values = [
        s.value for s in samples if s.name == name and labels.items() <= dict(s.labels).items()
    ]
    return sum(values) if values else None


def buckets(samples: Iterable[Sample], name: str) -> tuple[list[tuple[str, float]], float] | None:
    """A histogram's cumulative buckets and sum, summed over labels."""
    counts: dict[str, float] = {}
    sum_ = 0.0
    for sample in samples:
        if sample.name == f"{name}_bucket":
            edge = sample.labels["le"]
            counts[edge] = counts.get(edge, 0.0) + sample.value
        elif sample.name == f"{name}_sum":
            sum_ += sample.value
    if not counts:
        return None
    return sorted(counts.items(), key=lambda item: float(item[0])), sum_
