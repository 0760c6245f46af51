"""What probes cost users: ``python -m benchmarks.rollout.probing``.

One real engine with the fixture, clients that stream from it, and the prober, whose two probes (the
original's and the pruned one's) both go to this engine: twice what either would get. Blocks with
probes and without alternate (A B B A), so that what else the machine does falls on both; each pair
gives ratios with / without.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, quantiles, stdev
from typing import Any, Final

from scipy import stats

from benchmarks.fixtures import MODEL
from moe_serve.demo.clients import client
from moe_serve.rollout.policy import Policy, Probes
from moe_serve.rollout.prober import prober_of
from moe_serve.serving.engine import EngineSpec, has_gpu, is_ready
from moe_serve.serving.ports import free_port
from moe_serve.serving.state import EngineState, StackState
from moe_serve.serving.variants import ORIGINAL, VARIANTS

TOKENS: Final = 32
_SERVED: Final = "m"


@dataclass(kw_only=True)
class Block:
    """What users met for some seconds."""

    first: list[float] = field(default_factory=list)
    """Seconds to the first token, of each request."""
    whole: list[float] = field(default_factory=list)
    """Seconds to the last one."""
    probes: int = 0

    def figures(self) -> dict[str, float]:
        """Medians, and what one in ten exceeds."""
        return {
            "first token, median": median(self.first),
            "first token, 90 %": quantiles(self.first, n=10)[-1],
            "request, median": median(self.whole),
            "request, 90 %": quantiles(self.whole, n=10)[-1],
        }


def ask(url: str, seconds: float, clients: int) -> Block:
    """Streams from several clients at a time; what one has begun is ended."""
    block, until = Block(), time.monotonic() + seconds

    def run(number: int) -> None:
        with client(f"{url}/v1") as openai:
            asked = 0
            while time.monotonic() < until:
                asked += 1
                began = time.perf_counter()
                stream = openai.completions.create(
                    model=_SERVED,
                    prompt=f"{number} {asked} def ",
                    max_tokens=TOKENS,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                arrivals = [time.perf_counter() - began for _ in stream]
                block.first.append(arrivals[0])
                block.whole.append(arrivals[-1])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return block


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def probed(url: str, seconds: float, clients: int, interval: float) -> Block:
    """The same while probes are asked at their rate."""
    engine = EngineState(url=url, model=str(MODEL))
    stack = StackState(
        pid=0,
        endpoint=f"{url}/v1",
        control="",
        admin="",
        envoy_pid=0,
        served_model=_SERVED,
        engines=dict.fromkeys(VARIANTS, engine),
    )
    policy = Policy(probes=Probes(interval_seconds=interval))
    prober = prober_of(policy, stack, _say, None)
    prober.start()
    try:
        block = ask(url, seconds, clients)
    finally:
        prober.stop()
    block.probes = len(prober.quality().results)
    # One in flight must not reach into the next block.
    with prober.quiet():
        time.sleep(1.0)
    return block


def ratios(pairs: list[tuple[Block, Block]]) -> dict[str, tuple[float, float, float]]:
    """Figure → (with / without, 95 % interval); Student's t on the logarithms over pairs."""
    found = {}
    for name in pairs[0][0].figures():
        logs = [math.log(w.figures()[name] / without.figures()[name]) for w, without in pairs]
        half = float(stats.t.ppf(0.975, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs))
        middle = fmean(logs)
        found[name] = (math.exp(middle), math.exp(middle - half), math.exp(middle + half))
    return found


def measure(url: str, options: Any, interval: float) -> list[tuple[Block, Block]]:
    """Pairs of blocks, with probes and without, in turns."""
    pairs = []
    for number in range(options.pairs):
        with_first = number % 2 == 0
        found = {}
        for with_probes in (with_first, not with_first):
            found[with_probes] = (
                probed(url, options.seconds, options.clients, interval)
                if with_probes
                else ask(url, options.seconds, options.clients)
            )
        pairs.append((found[True], found[False]))
    return pairs


def main() -> None:
    """Print a table for the default rate of probes and for ten times as many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=2)
    options = parser.parse_args()
    gpu = has_gpu()
    with tempfile.TemporaryDirectory() as folder:
        spec = EngineSpec(
            variant=ORIGINAL,
            model=MODEL,
            served_model=_SERVED,
            port=free_port(),
            log=Path(folder) / "engine.log",
            arguments=("--scheduling-policy", "priority"),
        )
        child = spec.launch(gpu=gpu, yielding=False)
        try:
            while not is_ready(spec, child):
                time.sleep(0.5)
            ask(spec.url, options.seconds, options.clients)
            print("| a probe every | asked | users' requests | " + " | ".join(_NAMES) + " |")
            print("|---|---|---|" + "---|" * len(_NAMES))
            for interval in (10.0, 1.0):
                _row(interval, measure(spec.url, options, interval))
        finally:
            child.stop(10.0)


_NAMES: Final = tuple(Block(first=[1.0, 1.0], whole=[1.0, 1.0]).figures())


def _row(interval: float, pairs: list[tuple[Block, Block]]) -> None:
    asked = sum(with_probes.probes for with_probes, _ in pairs)
    requests = sum(len(block.whole) for pair in pairs for block in pair)
    cells = [f"{r:.2f} ({low:.2f} to {high:.2f})" for r, low, high in ratios(pairs).values()]
    print(f"| {interval:g} s | {asked} | {requests} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
