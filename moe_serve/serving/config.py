"""``stack.toml``: what ``moe-serve up`` starts."""

from __future__ import annotations

from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from moe_serve.files import read_toml, validating
from moe_serve.serving.listener import MAX_REQUEST_BYTES, Edge
from moe_serve.serving.variants import ORIGINAL, PRUNED


class StackConfig(BaseModel):
    """Every field can also be given on the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    original: Path
    """Checkpoint of the original model."""
    pruned: Path
    """Checkpoint of the pruned model, compact or stock."""
    host: str = "127.0.0.1"
    """Address of the OpenAI endpoint. Loopback unless you say otherwise."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port of the OpenAI endpoint."""
    control_port: int = Field(default=8001, ge=1, le=65535)
    """Port of page, API and metrics."""
    control_host: str = "127.0.0.1"
    """Address of page, API and metrics. Beyond loopback reading needs the token too; put TLS
    before it."""
    control_names: tuple[str, ...] = ()
    """Host names besides addresses and ``localhost`` under which they may be asked."""
    state: Path = Path("moe-serve-state")
    """Directory for routes, logs and the database; kept over restarts."""
    policy: Path | None = None
    """Policy of automatic rollouts; with one a controller watches, and ``rollout start`` begins."""
    original_url: str | None = None
    """``http://host:port`` of an engine that runs already, elsewhere; none is started then, and
    ``original`` is only read for its configuration."""
    pruned_url: str | None = None
    """The same for the pruned model's."""
    http_route: str | None = Field(default=None, pattern=r"^[a-z0-9.-]+/[a-z0-9.-]+$")
    """``namespace/name`` of a Gateway API HTTPRoute that splits the traffic on Kubernetes; no Envoy
    is started then. Its rules lead to Services named as the hosts of ``original_url`` and
    ``pruned_url``."""
    http_route_restores: bool = False
    """Whether weights that someone else wrote into it are put back, and that is said; otherwise
    they are kept and recorded, and pause a rollout. For routes that a deployment tool applies
    again and again."""
    tls_certificate: Path | None = None
    """PEM chain of the OpenAI endpoint; with one it speaks TLS only. Read again when replaced."""
    tls_key: Path | None = None
    """PEM private key of the certificate."""
    max_request_bytes: int = Field(default=MAX_REQUEST_BYTES, ge=1024)
    """Larger requests are refused with 413."""
    max_connections: int = Field(default=20_000, ge=1)
    """Client connections at a time; more are closed."""
    requests_per_second: int = Field(default=0, ge=0)
    """Of all clients whose key has no limit of its own, together; 0: no limit."""
    variant_header: bool = True
    """Whether clients may choose a variant by the header ``x-moe-serve-variant``."""
    access_log: bool = False
    """Whether the proxy writes a line for each request: no query, headers, or body."""
    model: str | None = None
    """The public model name; by default the original's directory name."""
    engine_args: tuple[str, ...] = ()
    """More arguments for both engines, as vLLM's server takes them."""
    original_args: tuple[str, ...] = ()
    """More arguments for the original's engine only."""
    pruned_args: tuple[str, ...] = ()
    """More arguments for the pruned model's engine only."""
    share_gpu: bool = False
    """Both engines on one GPU: the original sleeps while the pruned one has all traffic, and is
    woken before any goes back."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """KV-cache size of each engine on a machine without a GPU."""
    ready_seconds: float = Field(default=600.0, gt=0)
    """How long an engine may take to start."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """How long running requests may take to end after SIGTERM."""

    def models(self) -> dict[str, Path]:
        """Variant → checkpoint."""
        return {ORIGINAL: self.original, PRUNED: self.pruned}

    def urls(self) -> dict[str, str | None]:
        """Variant → address of an engine that runs already."""
        return {ORIGINAL: self.original_url, PRUNED: self.pruned_url}

    @field_validator("original_url", "pruned_url")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme != "http" or not parts.hostname or not parts.port or parts.path.strip("/"):
            raise ValueError("give it as http://host:port")
        return f"http://{parts.netloc}"

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        for file in (self.tls_certificate, self.tls_key):
            if file is not None and not file.is_file():
                raise ValueError(f"{file} is no file")
        return self

    @model_validator(mode="after")
    def _engines_are_elsewhere(self) -> Self:
        if self.http_route is not None and None in (self.original_url, self.pruned_url):
            raise ValueError("http_route needs original_url and pruned_url")
        return self

    @model_validator(mode="after")
    def _shared(self) -> Self:
        if self.share_gpu and any(self.urls().values()):
            raise ValueError("share_gpu is for engines that are started here")
        given = (*self.engine_args, *self.original_args, *self.pruned_args)
        if self.share_gpu and any(a.startswith(("--tensor-parallel-size", "-tp")) for a in given):
            raise ValueError("share_gpu is for one GPU")
        return self

    def edge(self) -> Edge:
        """What clients meet."""
        return Edge(
            host=self.host,
            port=self.port,
            certificate=str(self.tls_certificate.absolute()) if self.tls_certificate else "",
            private_key=str(self.tls_key.absolute()) if self.tls_key else "",
            max_request_bytes=self.max_request_bytes,
            max_connections=self.max_connections,
            requests_per_second=self.requests_per_second,
            pin_allowed=self.variant_header,
            access_log=str(self.state.absolute() / "logs" / "access.log")
            if self.access_log
            else "",
        )

    def arguments(self, variant: str) -> tuple[str, ...]:
        """Extra engine arguments of a variant."""
        own = self.original_args if variant == ORIGINAL else self.pruned_args
        return (*self.engine_args, *own)

    @property
    def control_url(self) -> str:
        """Where this machine reaches page, API and metrics."""
        return f"http://{_reached(self.control_host)}:{self.control_port}"

    @property
    def endpoint_url(self) -> str:
        """Where this machine reaches the OpenAI endpoint."""
        scheme = "https" if self.tls_certificate else "http"
        return f"{scheme}://{_reached(self.host)}:{self.port}/v1"

    @property
    def served_model(self) -> str:
        """The name clients use."""
        return self.model or self.original.resolve().name


def _reached(host: str) -> str:
    """The host of an address, as this machine's own programs write it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared
    return f"[{host}]" if ":" in host else host


def load_stack_config(path: Path | None, overrides: dict[str, object]) -> StackConfig:
    """Read the file, if there is one, and put the command line's values over it.

    Raises:
        UsageError: unreadable, or naming every field that is wrong.
    """
    values: dict[str, object] = {}
    if path is not None:
        values = read_toml(path, "give a TOML file that this user may read, or options alone")
    values |= {key: value for key, value in overrides.items() if value is not None}
    with validating(str(path or "options"), "give --original and --pruned, or correct stack.toml"):
        return StackConfig.model_validate(values)
