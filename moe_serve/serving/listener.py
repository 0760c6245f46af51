"""What clients meet: Envoy's listener, a file that it watches, so that keys change without a stop.

Settings follow Envoy's advice for edge proxies (docs: "Configuring Envoy as an edge proxy"), with
times that let answers stream for as long as they last.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_serve.files import read_json, reading, write_atomic
from moe_serve.serving.keys import KEY_HEADER, filters, load_keys
from moe_serve.serving.locks import keys_lock
from moe_serve.serving.routes import ANSWERED_BY, NAME, route_file
from moe_serve.serving.variants import HEADER

MAX_REQUEST_BYTES: Final = 16 * 1024**2
_FILTERS: Final = "type.googleapis.com/envoy.extensions.filters"
_MAX_HEADERS_KB: Final = 64
_MAX_HEADERS: Final = 100
_FOLDER: Final = "listener"
_SALT: Final = "users.salt"
_FILE_LOG: Final = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog"
_MOST_USERS_BYTES: Final = 32 * 1024**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """The settings of the public port."""

    host: str = "127.0.0.1"
    port: int
    certificate: str = ""
    """File of the PEM chain; with one the port speaks TLS only."""
    private_key: str = ""
    max_request_bytes: int = MAX_REQUEST_BYTES
    max_connections: int = 20_000
    requests_per_second: int = 0
    """Of all clients without a limit of their own; 0: no limit."""
    pin_allowed: bool = True
    """Whether a request header may choose the variant."""
    access_log: str = ""
    """File for a line per request; empty: none."""


def listener_file(state: Path) -> Path:
    """Where the listener's file of a state directory lies."""
    return state / _FOLDER / "listener.json"


def users_file(state: Path) -> Path:
    """Where the proxy says which variant answered which user, by hashes."""
    return state / "logs" / "users.log"


def trim_users(state: Path) -> None:
    """Empty the users' file once it is large; the proxy goes on at its new end."""
    with suppress(OSError):
        if users_file(state).stat().st_size > _MOST_USERS_BYTES:
            os.truncate(users_file(state), 0)


def put_listener(state: Path, edge: Edge) -> str:
    """Write the listener with the keys that there are; Envoy takes it from the rename.

    Connections of the listener before finish what they do. Returns its version. Of several at the
    same time each reads the keys anew, so that the last one's file holds all that were saved.

    Raises:
        UsageError: the file of keys is damaged.
        OutputError: it can't be written; the old one stays.
    """
    path = listener_file(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    users_file(state).parent.mkdir(exist_ok=True)
    users_file(state).touch(mode=0o600)
    if edge.certificate:
        write_atomic(path.with_name("tls.json"), json.dumps(_secret(edge), indent=1).encode())
    with keys_lock(state):
        listener = {
            "@type": "type.googleapis.com/envoy.config.listener.v3.Listener",
            **_listener(state, edge),
        }
        version = f"{time.time_ns()}"
        discovery = {"version_info": version, "resources": [listener]}
        # It holds the hashes of keys.
        write_atomic(path, json.dumps(discovery, indent=1).encode(), mode=0o600)
    return version


def listener_version(state: Path) -> str:
    """The version that was written last, by whomever.

    Raises:
        CheckpointError: the file is damaged.
    """
    return str(read_json(listener_file(state)).get("version_info", ""))


def address(host: str, port: int) -> dict[str, Any]:
    """Envoy's way to write it."""
    return {"socket_address": {"address": host, "port_value": port}}


def watched(path: Path) -> dict[str, Any]:
    """A source of configuration: a file that is replaced by renaming."""
    return {
        "resource_api_version": "V3",
        "path_config_source": {
            "path": str(path),
            "watched_directory": {"path": str(path.parent)},
        },
    }


def _listener(state: Path, edge: Edge) -> dict[str, Any]:
    chain: dict[str, Any] = {
        "filters": [
            {
                "name": "envoy.filters.network.http_connection_manager",
                "typed_config": _manager(state, edge),
            }
        ]
    }
    if edge.certificate:
        chain["transport_socket"] = _tls(state)
    return {
        "name": NAME,
        "address": address(edge.host, edge.port),
        "per_connection_buffer_limit_bytes": edge.max_request_bytes,
        "filter_chains": [chain],
    }


def _manager(state: Path, edge: Edge) -> dict[str, Any]:
    manager: dict[str, Any] = {
        "@type": f"{_FILTERS}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "rds": {"route_config_name": NAME, "config_source": watched(route_file(state))},
        # A stream may last as long as it likes, and be silent as long as a prompt is being read.
        "stream_idle_timeout": "600s",
        # Those that send slowly hold a connection and no more.
        "request_headers_timeout": "10s",
        "request_timeout": "300s",
        "drain_timeout": "5s",
        "common_http_protocol_options": {
            "max_headers_count": _MAX_HEADERS,
            "idle_timeout": "900s",
            "headers_with_underscores_action": "REJECT_REQUEST",
        },
        "http2_protocol_options": {
            "max_concurrent_streams": 100,
            "initial_stream_window_size": 65_536,
            "initial_connection_window_size": 1_048_576,
        },
        "max_request_headers_kb": _MAX_HEADERS_KB,
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "use_remote_address": True,
        "server_header_transformation": "PASS_THROUGH",
        "local_reply_config": _REPLIES,
        "http_filters": [
            *filters(
                load_keys(state),
                salt=_salt(state),
                pin_allowed=edge.pin_allowed,
                requests_per_second=edge.requests_per_second,
            ),
            {
                "name": "envoy.filters.http.buffer",
                "typed_config": {
                    "@type": f"{_FILTERS}.http.buffer.v3.Buffer",
                    "max_request_bytes": edge.max_request_bytes,
                },
            },
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_FILTERS}.http.router.v3.Router"},
            },
        ],
    }
    manager["access_log"] = [_users_log(users_file(state))]
    if edge.access_log:
        manager["access_log"].append(_access_log(edge.access_log))
    return manager


# The proxy's own words, in the shape that OpenAI's clients read errors in. Those that are in the
# shape already (the closed paths', the keys') pass as they are.
_REPLIES: Final = {
    "mappers": [
        {
            "filter": {
                "status_code_filter": {
                    "comparison": {
                        "op": "EQ",
                        "value": {"default_value": code, "runtime_key": f"moe_serve.reply_{code}"},
                    }
                }
            },
            "body_format_override": {
                "json_format": {
                    "error": {
                        "message": message,
                        "type": "proxy_error",
                        "param": None,
                        "code": code,
                    }
                }
            },
        }
        for code, message in {
            400: "the proxy cannot read this request",
            408: "the request took too long to arrive",
            413: "the request is larger than this server accepts",
            429: "more requests than this key, or this server, may take; try again later",
            431: "more headers, or longer ones, than this server accepts",
            503: "no engine can take this request now; try again later",
            504: "the engine did not answer in time",
        }.items()
    ]
}


def _access_log(path: str) -> dict[str, Any]:
    """A line of JSON for each request: neither query, nor headers, nor body."""
    fields = {
        "time": "%START_TIME%",
        "method": "%REQ(:METHOD)%",
        "path": "%PATH(NQ)%",
        "status": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "request_bytes": "%BYTES_RECEIVED%",
        "response_bytes": "%BYTES_SENT%",
        "milliseconds": "%DURATION%",
        "variant": f"%RESP({HEADER})%",
        "key": f"%REQ({KEY_HEADER})%",
    }
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": _FILE_LOG,
            "path": path,
            "log_format": {"json_format": fields},
        },
    }


def _salt(state: Path) -> str:
    """A stack keeps its own, for its owner to read, as long as its state directory is kept."""
    path = listener_file(state).with_name(_SALT)
    if not path.exists():
        write_atomic(path, secrets.token_hex(16).encode(), mode=0o600)
    with reading(path):
        return path.read_text(encoding="ascii")


def _users_log(path: Path) -> dict[str, Any]:
    """A line for each request of a user who can be told apart: :class:`.rollout.users.Line`."""
    # Not the header: a client may have gone before there were any.
    who = f"%START_TIME(%s)% %DYNAMIC_METADATA(moe_serve:user)% {ANSWERED_BY}"
    line = f"{who} %RESPONSE_CODE% %RESPONSE_FLAGS% %DURATION%\n"
    known = {
        "filter": "moe_serve",
        "path": [{"key": "user"}],
        "value": {"present_match": True},
    }
    return {
        "name": "envoy.access_loggers.file",
        "filter": {"metadata_filter": {"matcher": known, "match_if_key_not_found": False}},
        "typed_config": {
            "@type": _FILE_LOG,
            "path": str(path.absolute()),
            "log_format": {"text_format_source": {"inline_string": line}},
        },
    }


def _tls(state: Path) -> dict[str, Any]:
    """TLS 1.2 and later; certificates are read again when their directory changes."""
    kind = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
    secret = {"name": NAME, "sds_config": watched(listener_file(state).with_name("tls.json"))}
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": kind,
            "common_tls_context": {
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                "alpn_protocols": ["h2", "http/1.1"],
                "tls_certificate_sds_secret_configs": [secret],
            },
        },
    }


def _secret(edge: Edge) -> dict[str, Any]:
    secret = {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        "name": NAME,
        "tls_certificate": {
            "certificate_chain": {"filename": edge.certificate},
            "private_key": {"filename": edge.private_key},
            "watched_directory": {"path": str(Path(edge.certificate).parent)},
        },
    }
    return {"resources": [secret]}
