"""What the proxy adds: ``python -m benchmarks.serving.proxy``.

The real Envoy with the stack's configuration and one API key, in front of a stub that answers at
once, against the same stub asked directly, by the same clients in turns. Then streams that are
open and silent. Everything on loopback, bounded in count and time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from moe_serve.serving import envoy
from moe_serve.serving.keys import new_key
from moe_serve.serving.listener import Edge, put_listener
from moe_serve.serving.ports import free_port
from moe_serve.serving.process import Child, start
from moe_serve.serving.routes import write_split

BODY = json.dumps({"model": "m", "prompt": "x"}).encode()
_STREAMS: Final = 100
"""Of a connection, as many as the proxy's listener allows; opened at once."""
_PATIENCE: Final = 240.0
"""Seconds in which all streams have to be open, and for which each may be silent."""
ANSWER = json.dumps({"object": "text_completion", "choices": [{"text": "x"}]}).encode()


def serve(port: int) -> None:
    """The stub: one fixed answer, or on request a stream that starts and says no more."""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(_length(head))
                if b"x-silent" in head:
                    writer.write(
                        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\ndata: \r\n"
                    )
                else:
                    writer.write(
                        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
                    )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(client, "127.0.0.1", port, backlog=4096)
        await server.serve_forever()

    asyncio.run(run())


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0


def _request(port: int, key: str, more: str = "") -> bytes:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n{more}"
    head += f"authorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(BODY)}\r\n\r\n".encode() + BODY


async def load(port: int, key: str, *, connections: int, requests: int) -> dict[str, float]:
    """Requests over kept connections, each sending its next as soon as it has an answer."""
    sent = _request(port, key)
    took: list[float] = []

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(requests // connections):
            began = time.perf_counter()
            writer.write(sent)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(_length(head))
            took.append(time.perf_counter() - began)
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(connections)))
    seconds = time.perf_counter() - began
    cuts = statistics.quantiles(took, n=100)
    return {"per_second": len(took) / seconds, "p50_ms": 1e3 * cuts[49], "p99_ms": 1e3 * cuts[98]}


async def silent(port: int, key: str, count: int, hold: float) -> dict[str, Any]:
    """Open ``count`` streams, let them be silent, and ask once more beside them.

    They come over HTTP/2, many to a connection, as from a gateway: the proxy then holds one file
    for each, and not two, which the usual limits on open files allow.
    """
    gate = asyncio.Semaphore(_STREAMS)
    clients = [
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
            http1=False,
            http2=True,
            limits=httpx.Limits(max_connections=1),
            timeout=_PATIENCE,
        )
        for _ in range(-(-count // _STREAMS))
    ]

    async def one(client: httpx.AsyncClient) -> AsyncIterator[bytes]:
        async with gate:
            asked = client.build_request(
                "POST", "/v1/completions", content=BODY, headers={"x-silent": "1"}
            )
            answer = await client.send(asked, stream=True)
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code} {(await answer.aread()).decode()}")
            chunks = answer.aiter_raw()
            if await anext(chunks) != b"data: ":
                raise RuntimeError("began otherwise than the stub does")
            return chunks

    async def more(stream: AsyncIterator[bytes]) -> bytes:
        return await anext(stream, b"")

    async with asyncio.timeout(_PATIENCE):
        streams = await asyncio.gather(*(one(clients[i // _STREAMS]) for i in range(count)))
    waiting = [asyncio.create_task(more(stream)) for stream in streams]
    await asyncio.sleep(hold)
    beside = await load(port, key, connections=4, requests=400)
    ended = sum(task.done() for task in waiting)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await asyncio.gather(*(client.aclose() for client in clients))
    return {"opened": len(streams), "ended_early": ended, "beside": beside}


@contextmanager
def stack(folder: Path) -> Iterator[tuple[int, int, str, Child]]:
    """Stub and proxy: their ports, a key, and Envoy."""
    direct, port, admin_port = free_port(), free_port(), free_port()
    stub = multiprocessing.Process(target=serve, args=(direct,), daemon=True)
    stub.start()
    key = new_key(folder, "benchmark")
    write_split(folder, 50.0)
    edge = Edge(port=port)
    put_listener(folder, edge)
    engines = dict.fromkeys(("original", "pruned"), f"127.0.0.1:{direct}")
    config = envoy.bootstrap(folder, edge, admin_port=admin_port, engines=engines)
    (folder / "envoy.json").write_text(json.dumps(config))
    child = start("envoy", envoy.command(folder / "envoy.json"), folder / "envoy.log")
    try:
        admin = envoy.Admin(f"127.0.0.1:{admin_port}")
        while not admin.ready():
            time.sleep(0.05)
        # The first health check has to be over.
        while httpx.get(f"http://127.0.0.1:{port}/health").status_code != 200:
            time.sleep(0.05)
        yield direct, port, key, child
    finally:
        child.stop(5)
        stub.kill()


def main() -> None:
    """Measure in turns; print one object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--hold", type=float, default=10.0, help="seconds of silence")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    streams = min(options.streams, hard - 1000)
    with tempfile.TemporaryDirectory() as name, stack(Path(name)) as (direct, port, key, child):
        turns = []
        for _ in range(options.runs):
            pair = [
                asyncio.run(
                    load(to, key, connections=options.connections, requests=options.requests)
                )
                for to in (direct, port)
            ]
            turns.append(pair)
        process = psutil.Process(child.pid)
        before = process.memory_info().rss
        held = asyncio.run(silent(port, key, streams, options.hold))
        held["envoy_bytes_per_stream"] = (process.memory_info().rss - before) // streams
    print(
        json.dumps(
            {
                "direct": _median(pair[0] for pair in turns),
                "proxied": _median(pair[1] for pair in turns),
                "ratio": {
                    k: statistics.median(pair[1][k] / pair[0][k] for pair in turns)
                    for k in turns[0][0]
                },
                "silent_streams": held,
            },
            indent=1,
        )
    )


def _median(results: Iterator[dict[str, float]]) -> dict[str, float]:
    every = list(results)
    return {k: statistics.median(r[k] for r in every) for k in every[0]}


if __name__ == "__main__":
    main()
