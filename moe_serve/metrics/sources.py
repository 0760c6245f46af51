"""What engines and proxy say, parsed; a source that does not answer is absent, with its age."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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


class Endpoints(_Asked):
    """Envoy's ``/clusters``: requests per endpoint, whichever route led there."""

    def read(self, timeout: float = 2.0) -> dict[str, dict[str, int]] | None:
        """Cluster → outcome → requests; ``None`` when it does not answer.

        ``answered``: any status below 500; ``failed``: 500 and above, resets and time-outs.
        Statistics by cluster would charge a request to the route's cluster, not to who answered.
        """
        try:
            response = httpx.get(self.url, timeout=timeout)
            response.raise_for_status()
            found = response.json()["cluster_statuses"]
            counts = {
                cluster["name"]: _outcomes(host)
                for cluster in found
                for host in cluster.get("host_statuses", ())
            }
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        self.answered_at = time.monotonic()
        return counts


def _outcomes(host: dict[str, Any]) -> dict[str, int]:
    stats = {stat["name"]: int(stat.get("value", 0)) for stat in host["stats"]}
    return {"answered": stats["rq_success"], "failed": stats["rq_error"]}


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
