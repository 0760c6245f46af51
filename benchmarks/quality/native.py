"""Stock-loadable output against dropping whole experts: ``python -m benchmarks.quality.native``.

At equal expert bytes (native may use less: its widths are multiples of what kernels take), on
texts that were not calibrated on. The last two columns are native's KL over the best peer's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.fixtures import CALIBRATION, HELDOUT, MODEL
from moe_serve.evaluation.comparison import compare
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.request import DEFAULT_BATCH, PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection

_PEERS = ("drop-naee", "drop-reap", "drop-taylor", "drop-seer")
_LENGTH = 256


class Row(NamedTuple):
    """One output's quality."""

    mean: float
    worst: float
    share: float
    size: dict[str, int] | None


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--heldout", type=Path, default=HELDOUT)
    parser.add_argument("--keep", nargs="*", type=float, default=[0.75, 0.5])
    parser.add_argument("--tokens", type=int, default=8192, help="per domain")
    parser.add_argument("--router-refit", action="store_true", help="for native")
    options = parser.parse_args()
    print("| kept | method | expert bytes | KL mean | KL worst domain | ÷ best: mean | worst |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for keep in options.keep:
            rows = {
                name: measure(options, Path(folder), name, keep) for name in (*_PEERS, "native")
            }
            mean = min(rows[peer].mean for peer in _PEERS)
            worst = min(rows[peer].worst for peer in _PEERS)
            for name, row in rows.items():
                sized = f" {row.size['experts']} × {row.size['width']}" if row.size else ""
                print(
                    f"| {keep:.0%} | {name}{sized} | {row.share:.1%} | {row.mean:.4f} | "
                    f"{row.worst:.4f} | {row.mean / mean:.2f} | {row.worst / worst:.2f} |",
                    flush=True,
                )


def measure(options: argparse.Namespace, folder: Path, name: str, keep: float) -> Row:
    """Prune by a method (or to native) and compare; statistics are made once."""
    native = name == "native"
    output = folder / f"{name}-{keep:g}"
    prune(
        PruneRequest(
            model=options.model,
            output=output,
            texts=TextOptions(paths=(options.calibration,), tokens=options.tokens, length=_LENGTH),
            selection=Selection(
                method="auto" if native else name,
                keep=keep,
                uniform=native,
                router_refit=native and options.router_refit,
            ),
            form="native",
            statistics=folder / "statistics",
        ),
        Silent(),
    )
    held = TextOptions(paths=(options.heldout,), tokens=options.tokens, length=_LENGTH)
    found = compare(options.model, output, held, torch.device("cpu"), DEFAULT_BATCH, Silent())
    settings = json.loads((output / "plan.json").read_text())["settings"]
    return Row(
        mean=found.mean.kl_nats,
        worst=found.domains[found.worst].figures.kl_nats,
        share=found.expert_bytes["pruned"] / found.expert_bytes["original"],
        size=settings.get("size"),
    )


if __name__ == "__main__":
    main()
