"""Where a stack's split is written, and who says that it is in force: two places, one protocol."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from moe_serve.errors import OutputError
from moe_serve.serving.envoy import Admin
from moe_serve.serving.httproute import HttpRoute
from moe_serve.serving.routes import Split, put_spare, put_split, read_split, route_file
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import ORIGINAL, PRUNED


class Routing(Protocol):
    """What a change of the split needs."""

    @property
    def sticks(self) -> bool:
        """Whether a user can be kept on one variant."""
        ...

    @property
    def restores(self) -> bool:
        """Whether a split that someone else wrote is put back; otherwise it is kept."""
        ...

    def read(self) -> Split:
        """The split now, whoever wrote it; :class:`RolloutError` where it can't be read."""
        ...

    def put(self, split: Split, *, over: Split | None = None) -> None:
        """Write one; :class:`OutputError`, or :class:`Overtaken` where ``over`` no longer holds."""
        ...

    def fall_back(self, refused: OutputError) -> Split:
        """Everything on the original where nothing can be written, or raise ``refused``."""
        ...

    def digest(self) -> str | None:
        """SHA-256 of what is written now."""
        ...

    def digest_of(self, split: Split) -> str:
        """SHA-256 of what would be written."""
        ...

    def edited(self) -> tuple[str, float]:
        """Who wrote what is there, in words, and when (seconds since the epoch)."""
        ...

    def in_force(self) -> str | None:
        """Version of the split that traffic follows; :class:`RolloutError` where nobody says."""
        ...

    def confirm(self, version: str) -> None:
        """Wait until it is in force; :class:`RolloutError` where that is not said in time."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteFile:
    """The file that our own Envoy watches. An edit of it is a person's, and stays."""

    state: Path
    admin: Admin

    @property
    def sticks(self) -> bool:
        """By what the policy says."""
        return True

    @property
    def restores(self) -> bool:
        """Never: a file on this machine is edited on purpose."""
        return False

    def read(self) -> Split:
        """What the file says."""
        return read_split(self.state)

    def put(self, split: Split, *, over: Split | None = None) -> None:  # noqa: ARG002 - the lock keeps others out
        """By a rename."""
        put_split(self.state, split)

    def fall_back(self, refused: OutputError) -> Split:  # noqa: ARG002 - there is a way
        """The spare, by a rename alone."""
        return put_spare(self.state)

    def digest(self) -> str | None:
        """Of the file."""
        with suppress(OSError):
            return hashlib.sha256(route_file(self.state).read_bytes()).hexdigest()
        return None

    def digest_of(self, split: Split) -> str:
        """Of the file that would be."""
        return hashlib.sha256(split.encode()).hexdigest()

    def edited(self) -> tuple[str, float]:
        """A file does not say by whom."""
        return "the route file was edited by hand", route_file(self.state).stat().st_mtime

    def in_force(self) -> str | None:
        """Envoy's word."""
        return self.admin.route_version()

    def confirm(self, version: str) -> None:
        """Ask Envoy until it says so."""
        self.admin.confirm(version)


def routing_of(state: Path) -> Routing:
    """Where the stack of a state directory has its split.

    Raises:
        RolloutError: no stack was ever here.
    """
    stack = StackState.load(state)
    if stack.http_route is None:
        return RouteFile(state=state, admin=Admin(stack.admin))
    return http_route_of(
        stack.http_route,
        {name: engine.url for name, engine in stack.engines.items()},
        restores=stack.http_route_restores,
    )


def http_route_of(route: str, urls: dict[str, str], *, restores: bool) -> HttpRoute:
    """The route ``namespace/name``; a Service is the first label of its engine's host name."""
    namespace, _, name = route.partition("/")
    hosts = {variant: urlsplit(url) for variant, url in urls.items()}
    services = {variant: str(host.hostname).partition(".")[0] for variant, host in hosts.items()}
    return HttpRoute(
        namespace=namespace,
        name=name,
        original=services[ORIGINAL],
        pruned=services[PRUNED],
        pruned_port=hosts[PRUNED].port or 80,
        restores=restores,
    )
