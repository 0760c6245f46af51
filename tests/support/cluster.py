"""An API server with one HTTPRoute in it: what the official client needs of one, and its faults.

It stands in for a real one, which no package registry has: versions and conflicts as Kubernetes
counts them, defaults left out, writes checked against the schema of the Gateway API (its standard
channel, v1), and a gateway that says what it has accepted.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import jsonschema
import pytest
import yaml

from moe_serve.serving import httproute

MANIFEST: Final = (
    Path(__file__).parents[2] / "deploy" / "kubernetes" / "overlays" / "gateway-api" / "route.yaml"
)
PATH: Final = "/apis/gateway.networking.k8s.io/v1/namespaces/moe-serve/httproutes/openai"
_NAME: Final = {"type": "string", "minLength": 1, "maxLength": 253}
_PORT: Final = {"type": "integer", "minimum": 1, "maximum": 65535}
_LABEL: Final = {
    "type": "string",
    "maxLength": 63,
    "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
}
_HEADER: Final = {
    "type": "string",
    "minLength": 1,
    "maxLength": 256,
    "pattern": r"^[A-Za-z0-9!#$%&'*+\-.^_`|~]+$",
}


def _of(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any], most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most}


_REFERENCE: Final = {
    "group": {"type": "string", "maxLength": 253},
    "kind": {"type": "string", "pattern": "^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?$"},
    "name": _NAME,
    "namespace": _LABEL,
    "port": _PORT,
}
_SET: Final = _of("name value", name=_HEADER, value={"type": "string", "maxLength": 4096})
_MODIFIER: Final = _of(set=_list(_SET, 16), add=_list(_SET, 16), remove=_list(_HEADER, 16))
_FRACTION: Final = _of(
    "numerator",
    numerator={"type": "integer", "minimum": 0},
    denominator={"type": "integer", "minimum": 1},
)
_MIRROR: Final = {
    **_of(
        "backendRef",
        backendRef=_of("name", **_REFERENCE),
        fraction=_FRACTION,
        percent={"type": "integer", "minimum": 0, "maximum": 100},
    ),
    "not": {"required": ["fraction", "percent"]},
}
_FILTER: Final = _of(
    "type",
    type={"enum": ["RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror"]},
    requestHeaderModifier=_MODIFIER,
    responseHeaderModifier=_MODIFIER,
    requestMirror=_MIRROR,
)
_BACKEND: Final = _of(
    "name",
    **_REFERENCE,
    weight={"type": "integer", "minimum": 0, "maximum": 1_000_000},
    filters=_list(_FILTER, 16),
)
_MATCHED: Final = _of(
    "name value",
    type={"enum": ["Exact", "RegularExpression"]},
    name=_HEADER,
    value={"type": "string", "minLength": 1, "maxLength": 4096},
)
_MATCH: Final = _of(
    path=_of(
        type={"enum": ["Exact", "PathPrefix", "RegularExpression"]},
        value={"type": "string", "maxLength": 1024},
    ),
    headers=_list(_MATCHED, 16),
    method={"enum": ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]},
)
_SPAN: Final = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
SPEC: Final = _of(
    parentRefs=_list(_of("name", **_REFERENCE, sectionName=_NAME), 32),
    hostnames=_list({"type": "string", "minLength": 1, "maxLength": 253}, 16),
    rules=_list(
        _of(
            name=_NAME,
            matches=_list(_MATCH, 64),
            filters=_list(_FILTER, 16),
            backendRefs=_list(_BACKEND, 16),
            timeouts=_of(request=_SPAN, backendRequest=_SPAN),
        ),
        16,
    ),
)
"""Of an HTTPRoute, as far as our manifests and writes use it; stricter in that it takes no field
that is not named here. Where the API's schema names more, it is the API that is right."""


def merged(target: Any, patch: Any) -> Any:
    """JSON merge patch, RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


class Cluster:
    """The route, and what happens to requests for it."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """A route that its gateway has accepted."""
        self.route: dict[str, Any] | None = {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {
                "name": "openai",
                "namespace": "moe-serve",
                "resourceVersion": "1",
                "generation": 1,
            },
            "spec": copy.deepcopy(spec),
        }
        self.accepts = True
        """Whether the gateway takes what is written."""
        self.old = False
        """Whether its schema has no ``fraction``, and drops it as one does."""
        self.faults: list[str] = []
        """What becomes of the next writes: ``conflict``, ``hang``, ``lost`` (written, but no
        answer), a number (that status), ``""`` (nothing)."""
        self.down = False
        """Whether nothing is answered."""
        self.writes = 0
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self.gateway()

    def gateway(self) -> None:
        """It says that it has seen the present generation."""
        assert self.route is not None
        seen = self.route["metadata"]["generation"]
        said = "True" if self.accepts else "False"
        names = ("Accepted", "ResolvedRefs")
        conditions = [{"type": n, "status": said, "observedGeneration": seen} for n in names]
        self.route["status"] = {"parents": [{"conditions": conditions}]}

    def weights(self) -> list[list[int]]:
        """Of every rule."""
        assert self.route is not None
        rules = self.route["spec"]["rules"]
        return [[b.get("weight", 1) for b in rule["backendRefs"]] for rule in rules]

    def edit(self, change: dict[str, Any], manager: str) -> None:
        """As another client does, whatever version there is."""
        with self._lock:
            self._apply(change, manager)

    def reweigh(self, original: int, pruned: int, manager: str = "kubectl-edit") -> None:
        """Someone sets the weights."""
        assert self.route is not None
        rules = copy.deepcopy(self.route["spec"]["rules"])
        weights = {"original": original, "pruned": pruned}
        for rule in rules:
            if len(rule["backendRefs"]) == 2:
                for backend in rule["backendRefs"]:
                    backend["weight"] = weights[backend["name"]]
        self.edit({"spec": {"rules": rules}}, manager)

    def _apply(self, change: dict[str, Any], manager: str) -> None:
        assert self.route is not None
        new = merged(self.route, change)
        if self.old:
            for rule in new["spec"]["rules"]:
                for found in rule.get("filters", ()):
                    found.get("requestMirror", {}).pop("fraction", None)
        jsonschema.validate(new["spec"], SPEC)
        meta = new["metadata"]
        meta["resourceVersion"] = str(int(self.route["metadata"]["resourceVersion"]) + 1)
        meta["generation"] = self.route["metadata"]["generation"] + (
            new["spec"] != self.route["spec"]
        )
        others = [f for f in meta.get("managedFields", ()) if f["manager"] != manager]
        at = f"2026-01-01T00:00:{int(meta['resourceVersion']) % 60:02}Z"
        meta["managedFields"] = [*others, {"manager": manager, "time": at}]
        self.route = new
        if self.accepts:
            self.gateway()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]] | None:
        """Status and body; ``None``: the connection is closed without."""
        with self._lock:
            parts = urlsplit(path)
            if self.down:
                return None
            if self.route is None or parts.path != PATH:
                return 404, status(404, "NotFound")
            if method == "GET":
                return 200, copy.deepcopy(self.route)
            fault = self._fault()
            if fault.isdigit():
                return int(fault), status(int(fault), "Fault")
            refused = self._write(path, body) if fault != "hang" else None
        if fault == "hang":
            self._ended.wait(60)
        return None if fault in ("hang", "lost") else refused or (200, self.route or {})

    def _fault(self) -> str:
        """Of this write."""
        self.writes += 1
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "conflict":
            # Someone else was faster, with something of no interest.
            self._apply({"metadata": {"labels": {f"seen-{self.writes}": "1"}}}, "labeller")
        return fault

    def _write(self, path: str, body: bytes) -> tuple[int, dict[str, Any]] | None:
        """What is wrong with it, if anything is."""
        assert self.route is not None
        change = json.loads(body)
        present = self.route["metadata"]["resourceVersion"]
        if change["metadata"].get("resourceVersion", present) != present:
            return 409, status(409, "Conflict")
        try:
            self._apply(change, parse_qs(urlsplit(path).query)["fieldManager"][0])
        except jsonschema.ValidationError as exc:
            return 422, status(422, exc.message)
        return None

    def end(self) -> None:
        """Let go of what hangs."""
        self._ended.set()


def status(code: int, reason: str) -> dict[str, Any]:
    """The object that Kubernetes answers failures with."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "code": code,
    }


@contextmanager
def deployed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """With the route that is in ``deploy/``; nothing is slow but what is made so."""
    monkeypatch.setattr(httproute, "_PATIENCE", (60.0, 60.0))
    monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
    found = Cluster(next(yaml.safe_load_all(MANIFEST.read_text()))["spec"])
    with serving(found, folder / "kubeconfig"):
        yield found


@contextmanager
def serving(cluster: Cluster, kubeconfig: Path) -> Iterator[None]:
    """Behind a real socket; ``kubeconfig`` is written to say where."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("content-length", 0))
            found = cluster.answer(self.command, self.path, self.rfile.read(length))
            if found is None:
                self.close_connection = True
                return
            body = json.dumps(found[1]).encode()
            with suppress(OSError):
                self.send_response(found[0])
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        do_PATCH = do_GET

        def log_message(self, *_args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": address}}],
        "users": [{"name": "test", "user": {"token": "none"}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    }
    kubeconfig.write_text(yaml.safe_dump(config))
    try:
        yield
    finally:
        cluster.end()
        server.shutdown()
        thread.join(10)
