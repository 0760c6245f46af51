"""Connections that send nothing whole: given up in time, and never in the way of others.

uvicorn has a limit for silence between two requests, and none for one that never becomes whole.
"""

from __future__ import annotations

import asyncio
from typing import Final
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

_HEADERS_SECONDS: Final = 10.0
"""From the connection, or the answer before, until a request's headers are there."""
_MOST: Final = 128
"""Connections without a whole request; of more the one that has waited longest is closed. Who means
to ask has asked long before so many others came."""


class Bounded(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, with these two limits."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request; uvicorn narrows the type as well."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """A request may be whole now."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """Wait for the next one."""
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._forget()
        super().connection_lost(exc)

    def _look(self) -> None:
        cycle = self.cycle
        asked = cycle is not None and not cycle.response_complete
        if self._timer is not None and asked:
            # How long a body may take is the application's matter.
            self._timer.cancel()
            self._timer = None
        if asked and not cycle.more_body:
            self._forget()
        elif self not in _waiting(self.server_state) and not self.transport.is_closing():
            self._wait()

    def _wait(self) -> None:
        waiting = _waiting(self.server_state)
        waiting[self] = None
        self._timer = self.loop.call_later(_HEADERS_SECONDS, self.transport.close)
        if len(waiting) > _MOST:
            oldest = next(iter(waiting))
            oldest._forget()  # noqa: SLF001 - one of its own
            oldest.transport.abort()

    def _forget(self) -> None:
        _waiting(self.server_state).pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


_WAITING: Final[WeakKeyDictionary[ServerState, dict[Bounded, None]]] = WeakKeyDictionary()


def _waiting(state: ServerState) -> dict[Bounded, None]:
    """Of one server, the oldest first."""
    return _WAITING.setdefault(state, {})
