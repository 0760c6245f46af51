"""A compact engine under mixed load, beside stock: ``python -m benchmarks.serving.soak``.

The same requests, short, long, streamed, cancelled and malformed, go to an engine with a compact
checkpoint and to stock vLLM with its tied twin. Printed: how each kind ended on both, where the
two differ, and how both engines' memory grew. Exit 1 where the two ended differently, or compact
grew faster than stock by more than 1 % of itself in an hour: a cache that fills grows both.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np

from benchmarks.fixtures import MODEL
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.metrics.memory import process_tree, resident_bytes
from moe_serve.serving.engine import EngineSpec, has_gpu, is_ready
from moe_serve.serving.process import Child, free_port
from tests.support.twins import make_twins, random_table

SERVED: Final = "soak"
WORKERS: Final = 4
LENGTH: Final = 512
SETTLED: Final = 1 / 3
"""Of the run; allocators fill their pools before."""
Send = Callable[[str, random.Random], str]


@dataclass(kw_only=True)
class Seen:
    """What happened so far."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    """Kind → "outcome on stock, outcome on compact" → how often."""
    memory: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """Engine → seconds and resident bytes."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, stock: str, compact: str) -> None:
        """Add one request."""
        with self.lock:
            self.outcomes.setdefault(kind, Counter())[f"{stock}, {compact}"] += 1


def completion(url: str, body: dict[str, Any] | bytes) -> str:
    """Status and reason of one that is not streamed."""
    sent: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{url}/v1/completions", headers=headers, timeout=120, **sent)
    if reply.status_code != 200:
        return str(reply.status_code)
    return f"200 {reply.json()['choices'][0]['finish_reason']}"


def stream(url: str, body: dict[str, Any], chunks: int | None) -> str:
    """Read ``chunks`` events, then hang up; all without a number."""
    seen = 0
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=120
    ) as reply:
        for line in reply.iter_lines():
            seen += line.startswith("data: {")
            if line == "data: [DONE]":
                return f"{reply.status_code} done"
            if chunks is not None and seen >= chunks:
                return f"{reply.status_code} hung up"
        return f"{reply.status_code} cut"


def asked(rng: random.Random, prompt: int, generated: int) -> dict[str, Any]:
    """A request with random tokens."""
    return {
        "model": SERVED,
        "prompt": [rng.randrange(1, 256) for _ in range(prompt)],
        "max_tokens": generated,
        "temperature": 0.0,
        "ignore_eos": True,
    }


def malformed(url: str, rng: random.Random) -> str:
    """One of the ways to get it wrong."""
    body = asked(rng, 4, 4)
    bodies: tuple[dict[str, Any] | bytes, ...] = (
        b"{",
        body | {"max_tokens": -1},
        body | {"model": "another"},
        body | {"prompt": [10**9]},
        asked(rng, LENGTH + 1, 4),
        body | {"temperature": "hot"},
        body | {"prompt": []},
    )
    return completion(url, rng.choice(bodies))


KINDS: Final[dict[str, Send]] = {
    "short": lambda url, rng: completion(url, asked(rng, rng.randint(1, 16), 8)),
    "long": lambda url, rng: completion(url, asked(rng, rng.randint(200, 400), 64)),
    "streamed": lambda url, rng: stream(url, asked(rng, 32, 32), None),
    "cancelled": lambda url, rng: stream(url, asked(rng, 32, 200), rng.randint(1, 5)),
    "malformed": malformed,
}


def outcome(send: Send, url: str, seed: int) -> str:
    """How it ended; the same seed asks the same."""
    try:
        return send(url, random.Random(seed))
    except (httpx.HTTPError, ValueError, KeyError) as exc:
        return type(exc).__name__


def work(worker: int, stock: str, compact: str, until: float, seen: Seen) -> None:
    """One request after the other, each to both."""
    number = 0
    while time.monotonic() < until:
        seed = number * WORKERS + worker
        kind = random.Random(seed).choice(tuple(KINDS))
        send = KINDS[kind]
        seen.note(kind, outcome(send, stock, seed), outcome(send, compact, seed))
        number += 1


def start(name: str, model: Path, folder: Path) -> tuple[EngineSpec, Child]:
    """An engine that is ready."""
    spec = EngineSpec(
        variant=name,
        model=model,
        served_model=SERVED,
        port=free_port(),
        log=folder / f"{name}.log",
        arguments=("--max-model-len", str(LENGTH)),
    )
    child = spec.launch(gpu=has_gpu(), yielding=False)
    while not is_ready(spec, child):
        time.sleep(0.5)
    return spec, child


def growth(memory: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Slope in MiB per minute after settling, and what an hour of it would add, as a share."""
    settled = np.array([m for m in memory if m[0] >= memory[-1][0] * SETTLED])
    slope = float(np.polyfit(settled[:, 0], settled[:, 1], 1)[0])
    return slope * 60 / 2**20, slope * 3600 / float(settled[:, 1].mean())


def soak(minutes: float, folder: Path) -> Seen:
    """Start both engines, send, stop them."""
    opened = open_checkpoint(MODEL)
    shape = opened.shape
    tables = {
        layer: random_table(
            layer, "empty", experts=shape.experts, width=shape.width, top_k=shape.top_k
        )
        for layer in opened.family.moe_layers(opened.config)
    }
    make_twins(MODEL, folder / "compact", folder / "tied", tables)
    seen = Seen()
    children: list[Child] = []
    try:
        specs = []
        for name in ("tied", "compact"):
            spec, child = start(name, folder / name, folder)
            specs.append(spec)
            children.append(child)
        began = time.monotonic()
        until = began + minutes * 60
        threads = [
            threading.Thread(target=work, args=(n, specs[0].url, specs[1].url, until, seen))
            for n in range(WORKERS)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for spec, child in zip(specs, children, strict=True):
                if (size := resident_bytes(process_tree(child.pid))) is not None:
                    at = time.monotonic() - began
                    seen.memory.setdefault(spec.variant, []).append((at, size))
            time.sleep(2)
    finally:
        for child in children:
            child.stop(15)
    return seen


def main(arguments: Sequence[str]) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="moe-serve-soak-") as folder:
        seen = soak(given.minutes, Path(folder))
    print("| request | stock, compact | how often |\n|---|---|---|")
    beyond = 0
    for kind, outcomes in sorted(seen.outcomes.items()):
        for both, count in sorted(outcomes.items()):
            stock, compact = both.split(", ")
            beyond += count * (stock != compact)
            print(f"| {kind} | {both} | {count} |")
    total = sum(sum(outcomes.values()) for outcomes in seen.outcomes.values())
    print(f"\n{total} requests to each in {given.minutes:g} minutes, {beyond} ended differently")
    hours = []
    for name, memory in seen.memory.items():
        slope, hour = growth(memory)
        hours.append(hour)
        first, last = memory[0][1] / 2**20, memory[-1][1] / 2**20
        print(f"{name}: {first:.0f} to {last:.0f} MiB; {slope:+.2f} a minute, {hour:+.2%} an hour")
    return 1 if beyond or hours[1] - hours[0] > 0.01 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
