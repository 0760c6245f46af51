"""What 1, 100 and 10,000 engines cost: ``python -m benchmarks.rollout.fleet``.

Measured: a real Prometheus that scrapes 2, 100 and 1,000 engines of 200 series each, its memory,
its samples, and the queries of one decision against it; the decision itself. What lies beyond is on
paper, by the slopes that were measured, and marked. About four minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import yaml

from moe_serve.metrics.sources import OUTCOMES
from moe_serve.rollout.decision import Decision, decide
from moe_serve.rollout.policy import Policy, Prometheus
from moe_serve.rollout.reading import ArmReading, Reading
from moe_serve.rollout.sources import ENDED, HISTOGRAMS, TOKENS, PrometheusSources
from moe_serve.rollout.state import State, enter
from moe_serve.rollout.window import Window
from moe_serve.serving.ports import free_port
from moe_serve.serving.process import start
from moe_serve.serving.variants import VARIANTS

SERIES: Final = 200
"""Of one engine."""
_EDGES: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_HOURS: Final = 24 * 15
"""Prometheus keeps fifteen days unless told otherwise."""
_BYTES: Final = 1.5
"""Of a sample on disk, after compaction: Prometheus's documentation says one to two."""


def page(count: int) -> bytes:
    """An engine's ``/metrics`` after ``count`` requests: 200 series, the guards' own among them."""
    lines, left = [], SERIES
    for name in (*HISTOGRAMS.values(), TOKENS, "vllm:inter_token_latency_seconds"):
        lines.append(f"# TYPE {name} histogram")
        lines += [
            f'{name}_bucket{{le="{edge}"}} {count * (i + 1)}' for i, edge in enumerate(_EDGES)
        ]
        total = count * len(_EDGES)
        lines += [f'{name}_bucket{{le="+Inf"}} {total}', f"{name}_count {total}", f"{name}_sum 1"]
    lines += [f'{ENDED}{{finished_reason="{end}"}} {count}' for end in ("stop", "length", "abort")]
    for outcome in OUTCOMES:
        lines.append(f'moe_serve_requests_total{{outcome="{outcome}"}} {count}')
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        lines.append(f"vllm:{name} {count % 7}")
    left -= sum(not line.startswith("#") for line in lines)
    lines.append("process_start_time_seconds 1")
    left -= 1
    lines += [f'vllm:other{{kind="{i}"}} {count}' for i in range(left)]
    return ("\n".join(lines) + "\n").encode()


@contextmanager
def engines() -> Iterator[str]:
    """One server that is as many engines as are asked for; its address."""
    began = time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body in one packet, as engines send them.
        wbufsize = 2**16

        def do_GET(self) -> None:
            body = page(int(time.monotonic() - began) + 1)
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_args: object) -> None:
            """A Prometheus that is stopped hangs up."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def timed(action: Callable[[], object], times: int) -> tuple[float, float]:
    """Medians: milliseconds on the clock, and of this process's processor time."""
    taken = []
    for _ in range(times):
        wall, used = time.perf_counter(), time.process_time()
        action()
        taken.append((time.perf_counter() - wall, time.process_time() - used))
    wall, used = (statistics.median(found) for found in zip(*taken, strict=True))
    return 1000 * wall, 1000 * used


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """A Prometheus over so many engines."""

    engines: int
    series: float
    resident: int
    samples_per_second: float
    cores: float
    reading_ms: float


def fleet(address: str, count: int, seconds: float, interval: int) -> Fleet:
    """Scrape ``count`` engines for a while; then take readings as the controller does."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _prometheus(Path(folder), address, count, interval) as (url, process),
    ):
        until = time.monotonic() + 180
        while _ask(url, 'count(up{job="engines"} == 1)') != count:
            if time.monotonic() > until:
                raise SystemExit(f"Prometheus does not get through {count} engines")
            time.sleep(1.0)
        used, began = sum(process.cpu_times()[:2]), time.monotonic()
        time.sleep(seconds)
        cores = (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - began)
        source = PrometheusSources(Prometheus(prometheus=url))
        policy = Policy()
        if source.read(policy).arms["pruned"].requests is None:
            raise SystemExit("the controller's queries find nothing")
        reading, _ = timed(lambda: source.read(policy), 7)
        return Fleet(
            engines=count,
            series=_ask(url, "prometheus_tsdb_head_series"),
            resident=process.memory_info().rss,
            samples_per_second=count * (SERIES + 5) / interval,
            cores=cores,
            reading_ms=reading,
        )


@contextmanager
def _prometheus(
    folder: Path, address: str, count: int, interval: int
) -> Iterator[tuple[str, psutil.Process]]:
    targets = [
        {
            "targets": [address],
            "labels": {
                "__metrics_path__": f"/{number}/metrics",
                "variant": VARIANTS[number % 2],
                "instance": f"engine-{number}",
            },
        }
        for number in range(count)
    ]
    port = free_port()
    config: dict[str, Any] = {
        "global": {"scrape_interval": f"{interval}s", "evaluation_interval": "1m"},
        "scrape_configs": [
            {"job_name": "engines", "static_configs": targets},
            {"job_name": "self", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]},
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    child = start(
        "prometheus",
        [
            *("prometheus", f"--config.file={folder / 'prometheus.yml'}"),
            *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}"),
        ],
        folder / "log",
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx.get(f"{url}/-/ready").is_success:
                    break
            except httpx.ConnectError:
                time.sleep(0.2)
            if child.exit_code is not None:
                raise SystemExit(child.tail())
        yield url, psutil.Process(child.pid)
    finally:
        child.stop(10)


def _ask(url: str, query: str) -> float:
    rows = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=60).json()
    found = rows["data"]["result"]
    return float(found[0]["value"][1]) if found else 0.0


def judged() -> tuple[Policy, Decision]:
    """One decision on a window of real shape, explained, with the policy that it is by."""
    policy = Policy()
    state, window = _stands(policy)
    found = decide(window, policy, state)
    if len(found.evidence) < len(policy.guards.latency()):
        raise SystemExit(f"nothing was judged: {found.words}")
    return policy, found


def decision() -> tuple[float, float]:
    """What it takes."""
    policy = Policy()
    state, window = _stands(policy)
    return timed(lambda: decide(window, policy, state), 20)


def _stands(policy: Policy) -> tuple[State, Window]:
    step = next(i for i, step in enumerate(policy.steps) if step.weight)
    state, window = enter(State(), policy, step, 0.0), Window(began=0.0, weight=1.0, version="v")
    for tick in range(3, 400):
        at = tick * policy.interval_seconds
        arms = {name: _arm(rate * at) for name, rate in zip(VARIANTS, (100.0, 1.0), strict=True)}
        window.add(Reading(at=at, tick=at, arms=arms), policy)
    return state, window


def _arm(requests: float) -> ArmReading:
    """An engine that answers well."""
    few = (requests / 50.0, requests)
    return ArmReading(
        requests=requests,
        failed=requests / 1000.0,
        over={"ttft": few, "tpot": few},
        shares={"truncated": few, "empty": few, "abandoned": few, "feedback": (0.0, 0.0)},
        running=4.0,
        waiting=0.0,
        kv_usage=0.3,
        healthy=True,
        engines={"": 1.0},
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="of scraping per fleet")
    parser.add_argument("--interval", type=int, default=15, help="seconds between scrapes")
    parser.add_argument("--engines", type=int, nargs="+", default=[2, 100, 1000])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with engines() as address:
        wall, used = decision()
        found = [fleet(address, n, options.seconds, options.interval) for n in options.engines]
    if options.json:
        print(json.dumps([_plain(f) for f in found]))
        return
    print(f"A decision takes {used:.1f} ms of processor time, {wall:.1f} ms on the clock.")
    print("\n| engines | series | samples/s | memory MiB | cores | a reading, ms | disk, 15 days |")
    print("|---|---|---|---|---|---|---|")
    for row in (*found, _on_paper(found, 10_000)):
        paper = "" if row in found else " (on paper)"
        disk = row.samples_per_second * 3600 * _HOURS * _BYTES / 2**30
        print(
            f"| {row.engines:,}{paper} | {row.series:,.0f} | {row.samples_per_second:,.0f} | "
            f"{row.resident / 2**20:,.0f} | {row.cores:.2f} | {row.reading_ms:,.0f} | "
            f"{disk:,.1f} GiB |"
        )


def _plain(row: Fleet) -> dict[str, float]:
    return {name: getattr(row, name) for name in Fleet.__slots__}


def _on_paper(found: list[Fleet], count: int) -> Fleet:
    """By the slope from the smallest to the largest that was measured."""
    a, b = found[0], found[-1]

    def line(name: str) -> float:
        low, high = float(getattr(a, name)), float(getattr(b, name))
        slope = (high - low) / max(1, b.engines - a.engines)
        return high + slope * (count - b.engines)

    return Fleet(
        engines=count,
        series=line("series"),
        resident=int(line("resident")),
        samples_per_second=line("samples_per_second"),
        cores=line("cores"),
        reading_ms=line("reading_ms"),
    )


if __name__ == "__main__":
    main()
