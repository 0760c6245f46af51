"""The record as a stream: every new line of the log, and the status whenever it changes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from starlette.concurrency import run_in_threadpool

from moe_serve.errors import MoeServeError
from moe_serve.rollout import schema, view
from moe_serve.rollout.store import Store

POLL: Final = 0.5
"""Seconds between looks."""
MOST: Final = 64
"""Streams at a time."""
_SILENCE: Final = 15.0
"""Seconds after which a comment is sent, so that proxies keep the stream."""
_BATCH: Final = 200


class Feed:
    """Looks once for all who listen."""

    def __init__(self, state: Path) -> None:
        """Of one state directory."""
        self.listeners = 0
        self._state, self._lock = state, threading.Lock()
        self._seen: tuple[float, schema.Status | None] = (-POLL, None)
        self._gate = asyncio.Lock()
        """One stream looks; the others wait here and not in a thread each."""

    def status(self) -> schema.Status | None:
        """At most :data:`POLL` old; ``None`` while it can't be read."""
        with self._lock:
            if time.monotonic() - self._seen[0] >= 0.8 * POLL:
                found = None
                with suppress(MoeServeError):
                    found = view.look(self._state)
                # Of the end: a look at a proxy that hangs takes seconds, and would be old at once.
                self._seen = (time.monotonic(), found)
            return self._seen[1]

    def _log(self, after: int | None) -> tuple[int, list[schema.LogEntry]]:
        """The last line's id, and the lines since one; without one none but the id."""
        store = Store(self._state)
        if after is None:
            last = store.log(1)
            return (last[0].id if last else 0), []
        found = store.log(_BATCH, after=after)
        return (found[-1].id if found else after), [view.entry_out(entry) for entry in found]

    async def listen(self, since: int | None) -> AsyncIterator[str]:
        """Events until whoever listens goes away.

        Args:
            since: id of the last log line that is known already; ``None``: begin with now.
        """
        self.listeners += 1
        try:
            told, spoke = "", time.monotonic()
            while True:
                try:
                    since, lines = await run_in_threadpool(self._log, since)
                except MoeServeError:
                    lines = []
                news = [_event("log", line.model_dump_json(), line.id) for line in lines]
                async with self._gate:
                    status = await run_in_threadpool(self.status)
                if status is not None:
                    content = status.model_dump_json(exclude={"at", "step_seconds"})
                    if content != told:
                        told = content
                        news.append(_event("status", status.model_dump_json()))
                if not news and time.monotonic() - spoke > _SILENCE:
                    news = [": still here\n\n"]
                if news:
                    spoke = time.monotonic()
                    yield "".join(news)
                await asyncio.sleep(POLL)
        finally:
            self.listeners -= 1


def _event(kind: str, data: str, number: int | None = None) -> str:
    """JSON has no line breaks, which would end an event."""
    name = f"id: {number}\n" if number is not None else ""
    return f"event: {kind}\n{name}data: {data}\n\n"
