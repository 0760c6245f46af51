"""Damaged checkpoints by the thousand: ``python -m benchmarks.serving.fuzz [CASES] [FIRST]``.

Prints how many were refused, and each case that ended in anything but the plugin's own error.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.support.fuzz import run_case


def main(arguments: Sequence[str]) -> int:
    """Run the cases; 1 if one crashed."""
    cases, first = (*map(int, arguments), *(10_000, 0)[len(arguments) :])
    outcomes: Counter[str] = Counter()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + cases):
            try:
                outcomes[run_case(seed, Path(folder))] += 1
            except Exception as exc:  # noqa: BLE001 - what it must never raise is what is counted
                outcomes["crashed"] += 1
                print(f"case {seed}: {type(exc).__name__}: {exc}")
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{cases} cases: {told}; {time.monotonic() - began:.0f} s")
    return 1 if outcomes["crashed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
