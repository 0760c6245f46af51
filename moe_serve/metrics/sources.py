"""What engines and proxy say, parsed; a source that does not answer is absent, with its age."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


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


class Source(_Asked):
    """Prometheus text."""

    def read(self, timeout: float = 2.0) -> list[Sample] | None:
        """All samples, or ``None`` when it does not answer in the format."""
        try:
            response = httpx.get(self.url, timeout=timeout)
            response.raise_for_status()
            families = list(text_string_to_metric_families(response.text))
        except (httpx.HTTPError, ValueError):
            return None
        self.answered_at = time.monotonic()
        return [sample for family in families for sample in family.samples]


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
    healthy: bool

    def outcomes(self) -> dict[str, int]:
        """Outcome → requests."""
        return {"answered": self.answered, "failed": self.failed, "cut": self.cut}


class Endpoints(_Asked):
    """Envoy's ``/clusters``: requests per endpoint, whichever route led there."""

    def read(self, timeout: float = 2.0) -> dict[str, Host] | None:
        """Cluster → its one host; ``None`` when Envoy does not answer.

        Statistics by cluster would charge a request to the route's cluster, not to who answered;
        only connections are counted by the cluster that they lead to.
        """
        admin = self.url.rsplit("/", 1)[0]
        try:
            with httpx.Client(timeout=timeout) as client:
                clusters = client.get(self.url).raise_for_status().json()["cluster_statuses"]
                cuts = client.get(f"{admin}/stats?filter={_CUT}$&format=json").raise_for_status()
                found = {s["name"]: int(s["value"]) for s in cuts.json()["stats"] if "name" in s}
            counts = {
                cluster["name"]: _host(host, found[f"cluster.{cluster['name']}.{_CUT}"])
                for cluster in clusters
                for host in cluster.get("host_statuses", ())
            }
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        self.answered_at = time.monotonic()
        return counts


_CUT: Final = "upstream_cx_destroy_remote_with_active_rq"


def _host(host: dict[str, Any], cut: int) -> Host:
    stats = {stat["name"]: int(stat.get("value", 0)) for stat in host["stats"]}
    ill = host.get("health_status", {})
    return Host(
        answered=stats["rq_success"],
        failed=stats["rq_error"],
        cut=cut,
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
