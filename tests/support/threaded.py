"""An HTTP application on this machine, served by a thread of the test's own process."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route


class Threaded:
    """Serves within a ``with`` block."""

    def __init__(self, routes: list[Route], port: int) -> None:
        """Nothing listens yet."""
        self.port = port
        config = uvicorn.Config(
            Starlette(routes=routes), host="127.0.0.1", port=port, log_level="error"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Self:
        """Start, and wait until it listens."""
        self._thread.start()
        while not self._server.started:
            time.sleep(0.001)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _exc: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self.stop()

    def stop(self) -> None:
        """Close the port."""
        self._server.should_exit = True
        self._thread.join(10)
