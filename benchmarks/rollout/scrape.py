"""What one scrape of the control process costs: ``python -m benchmarks.rollout.scrape``.

The control process as ``moe-serve up`` starts it, behind it the real Envoy, a record with a rollout
under way, and two engines of 200 series, which another process plays. A client that keeps its
connection, as Prometheus does, asks for ``/metrics``; beside it what two engines' own pages take to
fetch without us, one after the other: on a busy machine the clock counts the neighbours as well.
More than 10 ms of processor time a scrape is exit 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import httpx
import psutil

from benchmarks.fixtures import MODEL
from benchmarks.rollout.fleet import SERIES, engines, judged
from moe_serve.rollout.policy import Policy
from moe_serve.rollout.state import State, enter
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import move
from moe_serve.serving.ports import free_port
from moe_serve.serving.process import start
from moe_serve.serving.state import StackState
from moe_serve.serving.token import make_token
from tests.support.proxy import proxied

LIMIT_MS: Final = 10.0
_PAUSE: Final = 0.1
"""Seconds between scrapes: one does not queue behind another."""


def _serve(said: Connection) -> None:
    with engines() as address:
        said.send(address)
        said.recv()


@contextmanager
def played() -> Iterator[str]:
    """Engines in a process of their own, so that their time is not taken for ours."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    yield ours.recv()
    ours.send(None)
    process.join(10)


@contextmanager
def control(state: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The control process, and its address."""
    port = free_port()
    child = start(
        "control",
        [
            *(sys.executable, "-m", "moe_serve.rollout.control"),
            *("--state", str(state), "--port", str(port)),
        ],
        state / "control.log",
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while child.exit_code is None:
            try:
                if httpx.get(f"{url}/healthz").is_success:
                    break
            except httpx.ConnectError:
                time.sleep(0.2)
        yield url, psutil.Process(child.pid)
    finally:
        child.stop(5)


def times(urls: tuple[str, ...], count: int) -> list[float]:
    """Milliseconds that asking for all of them took, each time."""
    found = []
    with httpx.Client(timeout=30.0) as client:
        for number in range(count + 5):
            began = time.perf_counter()
            for url in urls:
                client.get(url).raise_for_status()
            if number >= 5:
                found.append(1000.0 * (time.perf_counter() - began))
            time.sleep(_PAUSE)
    return found


def under_way(state: Path) -> None:
    """A record with a rollout whose guards have all been judged."""
    make_token(state)
    move(state, 5, decision="set", reason="")
    policy, decision = judged()
    store = Store(state)
    step = next(i for i, step in enumerate(policy.steps) if step.weight)
    becomes = enter(State(), policy, step, time.time())
    store.note("policy", {}, state=becomes, policy=Policy.model_dump_json(policy))
    store.save_seen({"decision": decision.to_json()})


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scrapes", type=int, default=200)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        played() as address,
        proxied(Path(folder), model=MODEL) as proxy,
    ):
        stack = StackState.load(proxy.state)
        replace(
            stack,
            engines={
                name: replace(engine, url=f"http://{address}/{name}")
                for name, engine in stack.engines.items()
            },
        ).save(proxy.state)
        under_way(proxy.state)
        with control(proxy.state) as (url, process):
            series = sum(
                not line.startswith("#") for line in httpx.get(f"{url}/metrics").text.splitlines()
            )
            used = sum(process.cpu_times()[:2])
            ours = times((f"{url}/metrics",), options.scrapes)
            used = 1000.0 * (sum(process.cpu_times()[:2]) - used) / (options.scrapes + 5)
            pages = (*(f"http://{address}/{n}/metrics" for n in ("original", "pruned")),)
            floor = times(pages, options.scrapes)
    print("| asked for | series | median ms | 95 % within ms | processor ms |")
    print("|---|---|---|---|---|")
    _row("our `/metrics`", series, ours, f"{used:.1f}")
    _row("two engines' pages, without us", 2 * SERIES, floor, "")
    sys.exit(used > LIMIT_MS)


def _row(what: str, series: int, found: list[float], used: str) -> None:
    within = statistics.quantiles(found, n=20)[-1]
    print(f"| {what} | {series} | {statistics.median(found):.1f} | {within:.1f} | {used} |")


if __name__ == "__main__":
    main()
