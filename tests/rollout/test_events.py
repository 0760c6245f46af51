"""What streams of events cost those who do not listen."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from starlette.concurrency import run_in_threadpool

from moe_serve.errors import RolloutError
from moe_serve.rollout import view
from moe_serve.rollout.events import Feed
from tests.support.stacks import fake_stack


def test_one_slow_look_serves_all_who_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy hangs: each look takes a second, and forty streams do not take forty of them."""
    looks = []

    def slow(_state: Path) -> None:
        looks.append(time.monotonic())
        time.sleep(1.0)
        raise RolloutError("does not answer", remedy="wait", where="proxy")

    monkeypatch.setattr(view, "look", slow)
    fake_stack(tmp_path)
    feed = Feed(tmp_path)

    async def listen() -> None:
        streams = [feed.listen(None) for _ in range(40)]
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0.5)
        # Worker threads are left for other requests, a rollback's among them.
        began = time.monotonic()
        await run_in_threadpool(time.monotonic)
        assert time.monotonic() - began < 0.4
        await asyncio.sleep(2.5)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(listen())
    assert looks
