"""Rolling back under load while something is broken: ``python -m benchmarks.rollout.broken``.

The real Envoy with the stack's configuration before two stub engines, everything on pruned, 100
requests a second (open loop) and 32 streams in flight; no controller runs. Then
``moe-serve rollout rollback`` as a command, with one thing broken at a time. What a broken engine
or proxy had in its hands when it broke is lost and counted apart; of all else nothing may fail, and
no stream may end early.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from moe_serve.rollout.store import DATABASE
from moe_serve.rollout.traffic import move
from moe_serve.serving.variants import HEADER, ORIGINAL, PRUNED
from tests.support.proxy import Proxied, proxied

_BEFORE: Final = 2.0
_AFTER: Final = 4.0
"""Seconds of load before what breaks, and after the rollback."""
_PATIENCE: Final = 20.0
"""Seconds for a request at the end; longer is hung."""
QUICK: Final = b'{"prompt": "x", "return_token_ids": true}'
LONG: Final = b'{"prompt": "x", "stream": true}'


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One request's fate."""

    at: float
    """Wall clock when it was sent."""
    stream: bool
    who: str
    """The variant that answered, empty where none did."""
    fate: str
    """``whole``, ``failed``, or ``truncated``: begun and not ended."""


@dataclass(kw_only=True)
class Load:
    """Requests at a rate and streams in flight, until stopped; in a process of its own."""

    host: str
    port: int
    rate: float
    streams: int
    asked: list[Asked] = field(default_factory=list)
    stopped: bool = False

    async def run(self) -> None:
        """Until standard input ends, and then what is in flight to its end."""
        asyncio.get_running_loop().add_reader(sys.stdin, self._stop)
        async with asyncio.TaskGroup() as group:
            for _ in range(self.streams):
                group.create_task(self._stream())
            began, number = time.monotonic(), 0
            while not self.stopped:
                group.create_task(self._one(QUICK))
                number += 1
                await asyncio.sleep(max(0.0, began + number / self.rate - time.monotonic()))

    def _stop(self) -> None:
        self.stopped = True
        asyncio.get_running_loop().remove_reader(sys.stdin)

    async def _stream(self) -> None:
        while not self.stopped:
            await self._one(LONG)

    async def _one(self, body: bytes) -> None:
        at, raw = time.time(), b""
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(_PATIENCE):
                reader, writer = await asyncio.open_connection(self.host, self.port)
                try:
                    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
                    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                    while part := await reader.read(65_536):
                        raw += part
                finally:
                    writer.close()
        self.asked.append(_fate(at, raw, stream=body is LONG))
        if not raw:
            # Nobody listens: do not ask as fast as one can be refused.
            await asyncio.sleep(0.1)


def _fate(at: float, raw: bytes, *, stream: bool) -> Asked:
    head, _, body = raw.partition(b"\r\n\r\n")
    named = re.search(HEADER.encode() + rb": (\w+)", head)
    if not head.startswith(b"HTTP/1.1 200"):
        fate = "failed"
    elif stream:
        whole = b"data: [DONE]" in body and body.endswith(b"0\r\n\r\n")
        fate = "whole" if whole else "truncated"
    else:
        fate = "whole" if b'"text"' in body else "truncated"
    return Asked(at=at, stream=stream, who=named[1].decode() if named else "", fate=fate)


Break = Callable[[Proxied], Any]


@contextmanager
def nothing(_proxy: Proxied) -> Iterator[str]:
    """All is well but for the controller, which is dead in every case."""
    yield ""


@contextmanager
def locked(proxy: Proxied) -> Iterator[str]:
    """Another program holds SQLite's file."""
    db = sqlite3.connect(proxy.state / DATABASE, isolation_level=None)
    db.execute("BEGIN EXCLUSIVE")
    yield ""
    db.close()


@contextmanager
def full(_proxy: Proxied) -> Iterator[str]:
    """No file takes another byte."""
    yield "ulimit -f 0; "


@contextmanager
def hung(proxy: Proxied) -> Iterator[str]:
    """The pruned engine accepts, and never answers."""
    proxy.pruned.hang()
    yield ""


@contextmanager
def crashed(proxy: Proxied) -> Iterator[str]:
    """The pruned engine's process is gone."""
    proxy.pruned.die()
    yield ""


@contextmanager
def killed(proxy: Proxied) -> Iterator[str]:
    """Envoy is away when the rollback comes; it is started again after it."""
    proxy.child.stop(0)
    yield ""


CASES: Final[dict[str, Break]] = {
    "the controller alone is dead": nothing,
    "SQLite locked": locked,
    "disk full": full,
    "pruned engine hung": hung,
    "pruned engine crashed": crashed,
    "Envoy killed and started again": killed,
}


def _case(broken: Break, rate: float, streams: int) -> dict[str, float]:
    with (
        tempfile.TemporaryDirectory() as folder,
        proxied(Path(folder), chunks=10, pause=0.1) as proxy,
    ):
        move(proxy.state, 100, decision="set", reason="")
        options = ["--client", proxy.endpoint, f"--rate={rate}", f"--streams={streams}"]
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks.rollout.broken", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as client:
            time.sleep(_BEFORE)
            with ExitStack() as stack:
                moment = time.time()
                moved = _rollback(proxy.state, stack.enter_context(broken(proxy)))
                back = moved["written_at"]
                if broken is killed:
                    stack.enter_context(proxy.again())
                    back = time.time()
                time.sleep(_AFTER)
                out, _ = client.communicate()
    asked = [Asked(**one) for one in json.loads(out)]
    return _counted(asked, moved, moment, back, broken)


def _rollback(state: Path, before: str) -> dict[str, Any]:
    arguments = ["rollout", "rollback", "--state", str(state), "--json"]
    command = shlex.join([sys.executable, "-m", "moe_serve", *arguments])
    # Into pipes: a file could not be written to on a full disk.
    done = subprocess.run(
        ["bash", "-c", f"{before}exec {command}"], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _counted(
    asked: list[Asked], moved: dict[str, Any], moment: float, back: float, broken: Break
) -> dict[str, float]:
    """What went wrong, and of it what the broken part itself had in its hands."""
    written = float(moved["written_at"])

    def lost(one: Asked) -> bool:
        if broken is killed:
            return one.at < back
        # With pruned dead what was on its way there is lost, until the rollback at the latest.
        return broken in (hung, crashed) and one.at < back and one.who != ORIGINAL

    bad = [one for one in asked if one.fate != "whole"]
    late = [one for one in asked if one.at > written + 0.1 and one.who == PRUNED]
    return {
        "in force after ms": 1000.0 * (moved["effective_seconds"] or float("nan")),
        "requests": sum(not one.stream for one in asked),
        "streams": sum(one.stream for one in asked),
        "after the break": sum(one.at > moment for one in asked),
        "lost with the broken part": sum(map(lost, bad)),
        "failed": sum(one.fate == "failed" and not lost(one) for one in bad),
        "truncated": sum(one.fate == "truncated" and not lost(one) for one in bad),
        "pruned 0.1 s later": len(late),
    }


def main() -> None:
    """Print a row per case; exit 1 where anything failed that was not lost with what broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--client", help="endpoint to ask until standard input ends")
    options = parser.parse_args()
    if options.client:
        at = urlsplit(options.client)
        load = Load(
            host=at.hostname or "", port=at.port or 0, rate=options.rate, streams=options.streams
        )
        asyncio.run(load.run())
        print(json.dumps([asdict(one) for one in load.asked]))
        return
    wrong, head = 0.0, False
    for name, broken in CASES.items():
        row = _case(broken, options.rate, options.streams)
        if not head:
            print(f"| broken | {' | '.join(row)} |\n|---|{'---|' * len(row)}")
            head = True
        print(f"| {name} | {' | '.join(f'{value:.4g}' for value in row.values())} |", flush=True)
        wrong += row["failed"] + row["truncated"] + row["pruned 0.1 s later"]
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
