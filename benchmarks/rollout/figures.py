"""Recorded figures against clients' log: ``python -m benchmarks.rollout.figures --state DIR``.

Against a running ``moe-serve up``. For five minutes clients stream from both variants in turn (at
the same time two engines on few cores stall each other, and of such a tail two clocks see different
parts) and write down what they see, while a real Prometheus scrapes with the rules in ``deploy/``.
Then each recorded series is set beside the same figure from the log. A quantile of a histogram is
an interpolation between its edges, so the log's quantile is taken from the same edges; its exact
one stands beside it. Scrapes are as far apart, and may take as long, as in ``deploy/``: with an
engine that does not answer one takes two seconds, and if it failed for that, the other's traffic
would be missed too. Exit 1 when a figure is more than 5 % off, or a panel's expression is empty.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Final

from openai import APIStatusError

from moe_serve.demo.clients import client
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import VARIANTS
from tests.support.prometheus import query, scraping

GRAFANA: Final = Path(__file__).parents[2] / "deploy" / "grafana"
_WINDOW: Final = 300.0
"""Seconds that the rules look back."""
_TOLERANCE: Final = 0.05
_INTERVAL: Final = 5
"""Seconds between scrapes, as in ``deploy/``."""
_TURN: Final = 10.0
"""Seconds for which one variant is asked, then the other."""
_PAUSE: Final = 0.2
"""Seconds after a refusal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One answer, as its client saw it; seconds since the epoch."""

    variant: str
    sent: float
    arrivals: tuple[float, ...]
    """Of its tokens."""


class Log:
    """Streams from each variant in turn, until stopped."""

    def __init__(
        self, stack: StackState, streams: int, words: int, tokens: int, *, together: bool
    ) -> None:
        """``streams`` at a time, ``tokens`` long, to prompts of ``words``."""
        self.lines: list[Line] = []
        self.refused = dict.fromkeys(VARIANTS, 0)
        self._stack, self._words, self._tokens = stack, words, tokens
        self._streams, self._count = streams, itertools.count()
        self._turns = [VARIANTS] if together else [(variant,) for variant in VARIANTS]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._take_turns)

    def __enter__(self) -> Log:  # noqa: PYI034 - a plain class
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        """End, after the streams in flight."""
        self._stop.set()
        self._thread.join()

    def _take_turns(self) -> None:
        for variants in itertools.cycle(self._turns):
            if self._stop.is_set():
                return
            until = time.monotonic() + _TURN
            threads = [
                threading.Thread(target=self._run, args=(variant, until))
                for variant in variants
                for _ in range(self._streams)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _run(self, variant: str, until: float) -> None:
        with client(self._stack.endpoint, variant) as openai:
            while time.monotonic() < until and not self._stop.is_set():
                sent = time.time()
                try:
                    stream = openai.completions.create(
                        model=self._stack.served_model,
                        prompt=f"{next(self._count)} {'def ' * self._words}",
                        max_tokens=self._tokens,
                        stream=True,
                        extra_body={"ignore_eos": True},
                    )
                except APIStatusError:
                    # The engine does not answer, and the client asked for no other.
                    self.refused[variant] += 1
                    time.sleep(_PAUSE)
                    continue
                arrivals = tuple(time.time() for chunk in stream if chunk.choices)
                self.lines.append(Line(variant=variant, sent=sent, arrivals=arrivals))


def interpolated(values: Sequence[float], edges: Sequence[float], q: float) -> float:
    """The quantile as Prometheus makes it of a histogram with these edges."""
    counts = [0] * len(edges)
    for value in values:
        counts[bisect_left(edges, value)] += 1
    rank, below = q * len(values), 0
    for i, count in enumerate(counts):
        if below + count >= rank and count:
            low = edges[i - 1] if i else 0.0
            return low + (edges[i] - low) * (rank - below) / count
        below += count
    return edges[-2]


def compare(url: str, lines: Sequence[Line], at: float) -> list[tuple[str, ...]]:
    """Rows: series, recorded, from the log, off by, exact quantile."""
    rows: list[tuple[str, ...]] = []

    def row(series: str, variant: str, log: float, exact: float | None = None) -> None:
        name, _, labels = series.partition("{")
        more = f",{labels}" if labels else "}"
        (found,) = query(url, f'{name}{{variant="{variant}"{more}')
        value = float(found["value"][1])
        rows.append(
            (
                f"`{series}` {variant}",
                f"{value:.4g}",
                f"{log:.4g}",
                f"{value / log - 1:+.1%}",
                "" if exact is None else f"{exact:.4g}",
            )
        )

    for variant in VARIANTS:
        mine = [x for x in lines if x.variant == variant]
        ended = [x for x in mine if at - _WINDOW < x.arrivals[-1] <= at]
        row("variant:moe_serve_requests:rate5m", variant, len(ended) / _WINDOW)
        arrived = sum(at - _WINDOW < t <= at for x in mine for t in x.arrivals)
        row('variant:moe_serve_tokens:rate5m{kind="generation"}', variant, arrived / _WINDOW)
        seen = {
            "time_to_first_token": [x.arrivals[0] - x.sent for x in ended],
            "inter_token_latency": [
                b - a for x in ended for a, b in zip(x.arrivals, x.arrivals[1:], strict=False)
            ],
            "request_duration": [x.arrivals[-1] - x.sent for x in ended],
        }
        for name, values in seen.items():
            metric = f"moe_serve_{name}_seconds"
            # Of the last minutes: on a busy machine a scrape may just have failed.
            seen_edges = f'last_over_time({metric}_bucket{{variant="{variant}"}}[5m])'
            found = query(url, f"count by (le) ({seen_edges})")
            edges = sorted(float(r["metric"]["le"]) for r in found)
            for q in (50, 95) if name != "request_duration" else (95,):
                exact = quantiles(values, n=100)[q - 1]
                row(
                    f"variant:{metric}:p{q}_5m",
                    variant,
                    interpolated(values, edges, q / 100),
                    exact,
                )
    return rows


def pause(lines: Sequence[Line], variant: str) -> float:
    """Seconds for which a client of a variant waited for a token, at most."""
    return max(
        b - a
        for line in lines
        if line.variant == variant
        for a, b in itertools.pairwise((line.sent, *line.arrivals))
    )


def empty(url: str, seconds: float = 30.0) -> list[str]:
    """Expressions of panels that return nothing for some seconds; those about GPUs need one."""
    boards = [json.loads(file.read_text()) for file in sorted(GRAFANA.glob("*.json"))]
    left = [t["expr"] for b in boards for p in b["panels"] for t in p["targets"]]
    left = [expression for expression in left if "gpu" not in expression]
    until = time.monotonic() + seconds
    while left and time.monotonic() < until:
        left = [expression for expression in left if not query(url, expression)]
        time.sleep(0.5)
    return left


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--streams", type=int, default=2, help="at a time")
    parser.add_argument("--together", action="store_true", help="ask both at the same time")
    parser.add_argument("--words", type=int, default=200, help="of a prompt")
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    stack = StackState.load(options.state)
    with (
        tempfile.TemporaryDirectory() as folder,
        scraping(stack.control, Path(folder) / "prometheus", seconds=_INTERVAL) as url,
        Log(
            stack, options.streams, options.words, options.tokens, together=options.together
        ) as log,
    ):
        time.sleep(_WINDOW + 20.0)
        at = time.time()
        rows = compare(url, list(log.lines), at)
        lost = query(url, "sum by (job) (count_over_time((up == 0)[5m:1s]))")
        silent = empty(url)
    print("| recorded series | recorded | clients' log | off by | exact |")
    print("|---|---|---|---|---|")
    for found in rows:
        print(f"| {' | '.join(found)} |")
    pauses = [
        f"{variant} {pause(log.lines, variant):.1f} s, {log.refused[variant]} refused"
        for variant in VARIANTS
    ]
    failed = ", ".join(f"{r['metric']['job']} for {r['value'][1]} s" for r in lost) or "none"
    print(f"\nLongest wait for a token: {'; '.join(pauses)}. Failed scrapes: {failed}.")
    print(f"{len(log.lines):,} answers; panels without data: {', '.join(silent) or 'none'}")
    off = [r for r in rows if abs(float(r[3].rstrip("%")) / 100) > _TOLERANCE]
    sys.exit(bool(off or silent))


if __name__ == "__main__":
    main()
