"""GET over connections that are kept: what every scrape asks, as cheaply as it goes.

Straight to the address: engines and proxy are this stack's own, and no proxy of the environment is
between.
"""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

_KEPT_SECONDS: Final = 20.0
"""A connection is given up sooner than an engine or Envoy would close it."""
_MOST: Final = 4
"""Idle connections kept to one address."""

Where = tuple[str, str]
"""Scheme, and host with port."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What an address said."""

    status: int
    kind: str | None
    """Its content type."""
    body: bytes


@dataclass(slots=True)
class Connections:
    """Idle ones by address; several threads may ask."""

    _idle: dict[Where, list[tuple[float, http.client.HTTPConnection]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, url: str, timeout: float) -> bytes:
        """The body of an answer whose status is 200.

        Raises:
            OSError: there was none.
        """
        answer = self.answer(url, timeout)
        if answer.status != http.client.OK:
            raise OSError(f"{urlsplit(url).netloc}: status {answer.status}")
        return answer.body

    def answer(self, url: str, timeout: float) -> Answer:
        """Whatever is answered.

        Args:
            url: with its scheme.
            timeout: seconds for each step of it.

        Raises:
            OSError: nothing.
        """
        parts = urlsplit(url)
        where = (parts.scheme, parts.netloc)
        path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        connection = self._kept(where)
        if connection is not None:
            try:
                return self._ask(where, connection, path, timeout)
            except (http.client.HTTPException, ConnectionError):
                # Kept from a process that is gone: the next connection is a new one.
                connection.close()
        kind = http.client.HTTPSConnection if where[0] == "https" else http.client.HTTPConnection
        connection = kind(where[1], timeout=timeout)
        try:
            return self._ask(where, connection, path, timeout)
        except http.client.HTTPException as exc:
            raise OSError(f"{where[1]}: {type(exc).__name__}") from exc

    def _ask(
        self, where: Where, connection: http.client.HTTPConnection, path: str, timeout: float
    ) -> Answer:
        keep = False
        try:
            if connection.sock is not None:
                connection.sock.settimeout(timeout)
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            keep = not response.will_close
        finally:
            if keep:
                self._keep(where, connection)
            else:
                connection.close()
        kind = response.getheader("content-type")
        return Answer(status=response.status, kind=kind, body=body)

    def _kept(self, where: Where) -> http.client.HTTPConnection | None:
        oldest = time.monotonic() - _KEPT_SECONDS
        with self._lock:
            idle = self._idle.get(where, [])
            while idle:
                since, connection = idle.pop()
                if since >= oldest:
                    return connection
                connection.close()
        return None

    def _keep(self, where: Where, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            idle = self._idle.setdefault(where, [])
            idle.append((time.monotonic(), connection))
            if len(idle) > _MOST:
                idle.pop(0)[1].close()


CONNECTIONS: Final = Connections()
"""Of this process."""
