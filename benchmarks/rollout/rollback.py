"""Rolling back under load: ``python -m benchmarks.rollout.rollback --state DIR``.

Against a running ``moe-serve up``: sixteen streams in flight, traffic at 100 % pruned, then
``moe-serve rollout rollback`` as a command; ten times. A prober asks for ``/v1/models`` all the
time: the last request sent after the write that the pruned variant still answered gives the delay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

from moe_serve.demo.clients import Load
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import HEADER, PRUNED


class Prober:
    """Sends small requests one after the other, noting when and who answered."""

    def __init__(self, endpoint: str) -> None:
        """Ask ``/models`` there."""
        self.seen: list[tuple[float, str]] = []
        self._url = f"{endpoint}/models"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Prober:  # noqa: PYI034 - a plain class
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        """End."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(timeout=30) as client:
            while not self._stop.is_set():
                sent = time.time()
                self.seen.append((sent, client.get(self._url).headers.get(HEADER, "none")))

    def late(self, written_at: float) -> float:
        """Seconds after the write at which the last pruned answer was asked for; 0 if none was."""
        times = [sent - written_at for sent, who in self.seen if who == PRUNED]
        return max(0.0, *times)


def main() -> None:
    """Print a row per trial and the verdict; exit 1 when a request failed or was late."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--streams", type=int, default=16)
    options = parser.parse_args()
    stack = StackState.load(options.state)
    print("| trial | in force after ms | last pruned answer after ms | requests | failed |")
    print("|---|---|---|---|---|")
    bad = 0
    for trial in range(options.trials):
        rollout(options.state, "set", "100")
        with (
            Load(
                endpoint=stack.endpoint,
                model=stack.served_model,
                streams=options.streams,
                tokens=32,
            ) as load,
            Prober(stack.endpoint) as prober,
        ):
            time.sleep(2)
            moved = rollout(options.state, "rollback")
            time.sleep(1)
        late = prober.late(moved["written_at"])
        bad += load.failed + (late > 0.1)
        print(
            f"| {trial + 1} | {1000 * moved['effective_seconds']:.1f} | {1000 * late:.1f} | "
            f"{load.total} | {load.failed} |",
            flush=True,
        )
    sys.exit(bool(bad))


def rollout(state: Path, *arguments: str) -> dict[str, float]:
    """Run ``moe-serve rollout``."""
    command = [sys.executable, "-m", "moe_serve", "rollout", *arguments]
    done = subprocess.run(
        [*command, "--state", str(state), "--json"], capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
