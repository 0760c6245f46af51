"""``python -m moe_serve.evaluation.reading DIR``: read all weights once, and say what it took.

A process of its own, and few imports: what it grows by is the weights.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil


def main(path: Path) -> None:
    """Print seconds and bytes as JSON."""
    process = psutil.Process()
    before, begun = process.memory_info().rss, time.perf_counter()
    kept = [shard.read_bytes() for shard in sorted(path.glob("*.safetensors"))]
    seconds = time.perf_counter() - begun
    grown = process.memory_info().rss - before
    print(json.dumps({"load_seconds": seconds, "load_resident_bytes": grown, "files": len(kept)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
