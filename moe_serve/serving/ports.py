"""Ports to listen on: free ones, and whether one is free."""

from __future__ import annotations

import errno
import random
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

from moe_serve.errors import ServingError

# Below the ports that Linux hands to outgoing connections (from 32768 on unless set otherwise):
# an engine binds its port a minute after it was chosen, and any client of the machine could have
# it by then. Also below those that Kubernetes opens on its nodes.
_POOL: Final = range(20_000, 30_000)
_EPHEMERAL: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")

_ENOUGH: Final = 1000
"""Ports to choose from."""

_reserved: list[socket.socket] = []


def free_port() -> int:
    """A loopback TCP port that nobody listens on, and that no other call gives out.

    The UDP port of the same number is held until this process ends: that is how others that
    ask here, in this process or another, know that it is taken before anybody listens.

    Raises:
        ServingError: every port is taken.
    """
    pool = _pool()
    for port in random.sample(pool, len(pool)):
        if _reserve(port):
            return port
    raise ServingError(
        f"none is free of {pool.start} to {pool.stop - 1}",
        where="127.0.0.1",
        remedy="end processes of this machine that hold ports and are no longer needed",
    )


def _pool() -> range:
    """Ports that no outgoing connection gets, where the machine's settings leave enough."""
    with suppress(OSError, ValueError):
        lowest, highest = map(int, _EPHEMERAL.read_text().split())
        if lowest < _POOL.stop and highest >= _POOL.start:
            widest = max(range(1024, lowest), range(highest + 1, 65_536), key=len)
            return widest if len(widest) >= _ENOUGH else _POOL
    return _POOL


def _reserve(port: int) -> bool:
    """Take its UDP twin for good; no unless nobody listens there."""
    held = socket.socket(type=socket.SOCK_DGRAM)
    try:
        held.bind(("127.0.0.1", port))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
    except OSError:
        held.close()
        return False
    _reserved.append(held)
    return True


def port_is_free(host: str, port: int) -> bool:
    """Whether one could listen there, on every address that the host has.

    Raises:
        ServingError: the host is no address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise _nowhere(host, exc) from exc
    for family, _, _, _, address in found:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as exc:
            if exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise _nowhere(host, exc) from exc
            return False
    return True


def _nowhere(host: str, exc: OSError) -> ServingError:
    return ServingError(
        f"no address of this machine to listen on ({exc})",
        where=host,
        remedy="give 127.0.0.1, ::1, or an address that this machine has",
    )
