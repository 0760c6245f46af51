"""A compact engine under mixed load, beside stock: ``python -m benchmarks.serving.soak``.

The same requests go to an engine with a compact checkpoint and to stock vLLM with its tied twin,
both in FP32: short, long, chat, sampled, streamed; streams that are hung up on, clients that leave
before the answer, and requests that are wrong in ten ways. First every place of both caches is
written to, so that memory does not grow with it; nor with oneDNN's kernels for the processor, of
which it keeps those of the last 1,024 shapes unless told otherwise, as it is here. Printed is how
each kind ended on both and whether both said the same, then what each engine's memory and open
files did, with a 95 % interval for an hour's growth after the first third of the time.

Exit 1 where a request ended otherwise on one of the two, an engine still held a request or a piece
of the cache a minute after the last one, or compact surely grew faster than stock by more than 1 %
of itself in an hour.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
import psutil

from benchmarks.fixtures import MODEL
from benchmarks.serving.growth import Growth, beyond
from benchmarks.serving.kinds import KINDS, LENGTH, SERVED, Ended, asked, outcome, post
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import ServingError
from moe_serve.metrics.memory import process_tree, resident_bytes
from moe_serve.metrics.sources import Source, total
from moe_serve.serving.engine import EngineSpec, has_gpu, is_ready
from moe_serve.serving.ports import free_port
from moe_serve.serving.process import Child
from tests.support.twins import make_twins, random_table

ENGINES: Final = ("stock", "compact")
WORKERS: Final = 4
KERNELS: Final = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
"""Shapes whose kernels an engine keeps: more than one step needs."""
TOLERATED: Final = 0.01
_EVERY: Final = 2.0
_DRAINED: Final = 60.0
_MIB: Final = 2**20
_PLACES: Final = "moe_serve_kv_cache_capacity_tokens"
_HELD: Final = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
)


@dataclass(kw_only=True)
class Engine:
    """One of the two, and what was read of it."""

    spec: EngineSpec
    child: Child
    memory: list[tuple[float, float]] = field(default_factory=list)
    """Seconds and MiB resident."""
    files: list[int] = field(default_factory=list)
    """Open ones, sockets too."""
    held: float = 0.0
    """Requests and parts of the cache in use after the last request had ended."""

    def read(self, at: float) -> None:
        """Take a reading of all its processes."""
        files, processes = 0, process_tree(self.child.pid)
        for pid in processes:
            with suppress(psutil.NoSuchProcess):
                files += psutil.Process(pid).num_fds()
        self.files.append(files)
        self.memory.append((at, (resident_bytes(processes) or 0) / _MIB))

    def drain(self) -> None:
        """Wait until it holds nothing more, a minute at most."""
        metrics = Source(name=self.spec.variant, url=f"{self.spec.url}/metrics", keep=_HELD)
        until = time.monotonic() + _DRAINED
        while True:
            samples = metrics.read()
            known = [total(samples, name) for name in _HELD] if samples else [None]
            self.held = sum(float("inf") if value is None else value for value in known)
            if not self.held or time.monotonic() > until:
                return
            time.sleep(1)

    def errors(self) -> int:
        """Lines of its log that tell of one."""
        text = self.spec.log.read_text(errors="replace")
        return sum(" ERROR " in line or line.startswith("Traceback") for line in text.split("\n"))


@dataclass(kw_only=True)
class Seen:
    """How requests ended so far."""

    outcomes: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    """Kind → (on stock, on compact) → how often."""
    same: dict[str, Counter[bool]] = field(default_factory=dict)
    """Kind → whether both said the same → how often."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, stock: Ended, compact: Ended) -> None:
        """Add one request."""
        with self.lock:
            self.outcomes.setdefault(kind, Counter())[stock.how, compact.how] += 1
            if stock.how == compact.how and stock.said is not None:
                self.same.setdefault(kind, Counter())[stock.said == compact.said] += 1

    @property
    def differing(self) -> int:
        """Requests that ended otherwise on one of the two."""
        pairs = [pair for outcomes in self.outcomes.values() for pair in outcomes.elements()]
        return sum(stock != compact for stock, compact in pairs)

    def table(self) -> list[str]:
        """One line for each way to end."""
        lines = ["| request | ended on stock | on compact | how often | said the same |"]
        lines.append("|---|---|---|---|---|")
        for kind in KINDS:
            same = self.same.get(kind, Counter())
            for (stock, compact), count in sorted(self.outcomes.get(kind, Counter()).items()):
                alike = f"{same[True]} of {same.total()}" if same else ""
                lines.append(f"| {kind} | {stock} | {compact} | {count} | {alike} |")
                same = Counter()
        return lines


def work(worker: int, urls: Sequence[str], until: float, seen: Seen) -> None:
    """One request after the other, each to both, who is first by chance."""
    number = 0
    with httpx.Client(timeout=120) as client:
        while time.monotonic() < until:
            seed = number * WORKERS + worker
            rng = random.Random(seed)
            kind = rng.choice(tuple(KINDS))
            ended = {i: outcome(client, urls[i], kind, seed) for i in rng.sample((0, 1), 2)}
            seen.note(kind, ended[0], ended[1])
            number += 1


def fill(engine: Engine) -> None:
    """Write to every place of the cache: memory counts as used once something was written to it."""
    metrics = Source(name=engine.spec.variant, url=f"{engine.spec.url}/metrics", keep=(_PLACES,))
    places = total(metrics.read(10.0) or (), _PLACES)
    if places is None:
        raise ServingError(
            f"tells no {_PLACES}",
            where=engine.spec.url,
            remedy="run it where the plugin is installed",
        )
    rng = random.Random(0)
    prompts = [asked(rng, LENGTH - 2, 1) for _ in range(int(places) // (LENGTH - 2) + WORKERS)]
    with httpx.Client(timeout=120) as client, ThreadPoolExecutor(WORKERS) as pool:
        for ended in pool.map(lambda body: post(client, engine.spec.url, body), prompts):
            if ended.how != "200 length":
                raise ServingError(
                    f"a plain request ended with {ended.how}",
                    where=engine.spec.url,
                    remedy=f"see {engine.spec.log}",
                )


def start(name: str, model: Path, folder: Path) -> Engine:
    """An engine that is ready."""
    spec = EngineSpec(
        variant=name,
        model=model,
        served_model=SERVED,
        port=free_port(),
        log=folder / f"{name}.log",
        arguments=("--max-model-len", str(LENGTH), "--dtype", "float32"),
    )
    os.environ.update(KERNELS)
    child = spec.launch(gpu=has_gpu(), yielding=False)
    while not is_ready(spec, child):
        time.sleep(0.5)
    return Engine(spec=spec, child=child)


def soak(minutes: float, folder: Path) -> tuple[Seen, list[Engine]]:
    """Start both engines, send, stop them."""
    opened = open_checkpoint(MODEL)
    shape = opened.shape
    tables = {
        layer: random_table(
            layer, "empty", experts=shape.experts, width=shape.width, top_k=shape.top_k
        )
        for layer in opened.family.moe_layers(opened.config)
    }
    make_twins(MODEL, folder / "compact", folder / "stock", tables)
    seen = Seen()
    engines: list[Engine] = []
    try:
        engines.extend(start(name, folder / name, folder) for name in ENGINES)
        for engine in engines:
            fill(engine)
        urls = [engine.spec.url for engine in engines]
        began = time.monotonic()
        until = began + minutes * 60
        threads = [
            threading.Thread(target=work, args=(n, urls, until, seen)) for n in range(WORKERS)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            at = time.monotonic() - began
            for engine in engines:
                engine.read(at)
            time.sleep(_EVERY)
        for engine in engines:
            engine.drain()
    finally:
        for engine in engines:
            engine.child.stop(15)
    return seen, engines


def grown(engines: Sequence[Engine]) -> tuple[list[str], bool]:
    """What memory and files did, and whether compact surely grew beyond stock."""
    stock, compact = engines
    head = ["engine", "MiB", "growth in MiB an hour (95 %)", "of itself", "open files"]
    head += ["errors in its log", "held after the last"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    more = Growth.of(beyond(compact.memory, stock.memory))
    size = compact.memory[-1][1]
    for engine in engines:
        first, last = engine.memory[0][1], engine.memory[-1][1]
        files = engine.files[len(engine.files) // 3 :]
        cells = [
            engine.spec.variant,
            f"{first:.0f} to {last:.0f}",
            told(Growth.of(engine.memory), last),
            f"{min(files)} to {max(files)}, {files[-1]} at the end",
            str(engine.errors()),
            f"{engine.held:g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| compact beyond stock | | {told(more, size)} | | | |")
    return lines, more.low > TOLERATED * size


def told(growth: Growth, size: float) -> str:
    """Two cells: in MiB and as a share."""
    share = [f"{value / size:+.2%}" for value in (growth.slope, growth.low, growth.high)]
    return (
        f"{growth.slope:+.1f} ({growth.low:+.1f} to {growth.high:+.1f}) "
        f"| {share[0]} ({share[1]} to {share[2]})"
    )


def main(arguments: Sequence[str]) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="moe-serve-soak-") as folder:
        seen, engines = soak(given.minutes, Path(folder))
        lines, grew = grown(engines)
    requests = sum(outcomes.total() for outcomes in seen.outcomes.values())
    print("\n".join([*seen.table(), "", *lines, ""]))
    print(
        f"{requests} requests to each in {given.minutes:g} minutes, {seen.differing} ended "
        "otherwise on one of the two."
    )
    held = any(engine.held for engine in engines)
    return int(bool(seen.differing) or held or grew)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
