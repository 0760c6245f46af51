"""KL of every method at equal expert bytes: ``python -m benchmarks.quality.methods``.

Texts measured on were not calibrated on; the same tokens for every method.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.fixtures import CALIBRATION, HELDOUT, MODEL
from moe_serve.evaluation.comparison import Comparison, compare
from moe_serve.progress import Silent
from moe_serve.pruning.methods import METHODS
from moe_serve.pruning.request import DEFAULT_BATCH, Selection, TextOptions
from moe_serve.pruning.run import PruneRequest, prune

_BASELINE = "drop-reap"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--heldout", type=Path, default=HELDOUT)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--keep", nargs="*", type=float, default=[0.75, 0.5])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192, help="per domain")
    options = parser.parse_args()
    print("| method | expert bytes kept | KL mean | KL worst domain | top-1 | × drop-reap |")
    print("|---|---|---|---|---|---|")
    methods = [_BASELINE, *(m for m in options.methods if m != _BASELINE)]
    for keep in options.keep:
        baseline = 0.0
        for method in methods:
            found = [measure(options, method, keep, seed) for seed in range(options.seeds)]
            mean, worst, top1 = (sum(column) / len(found) for column in zip(*found, strict=True))
            baseline = mean if method == _BASELINE else baseline
            row = f"| {method} | {keep:.0%} | {mean:.4f} | {worst:.4f} | {top1:.1%} |"
            print(f"{row} {mean / baseline:.3f} |", flush=True)


def measure(
    options: argparse.Namespace, method: str, keep: float, seed: int
) -> tuple[float, float, float]:
    """Mean KL, worst-domain KL and top-1 agreement of one run."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pruned"
        texts = (options.calibration,) if METHODS[method].needs_texts else ()
        prune(
            PruneRequest(
                model=options.model,
                output=output,
                texts=TextOptions(paths=texts, tokens=options.tokens, length=256, seed=seed),
                selection=Selection(method=method, keep=keep, seed=seed),
            ),
            Silent(),
        )
        held = TextOptions(paths=(options.heldout,), tokens=options.tokens, length=256)
        found: Comparison = compare(
            options.model, output, held, torch.device("cpu"), DEFAULT_BATCH, Silent()
        )
    worst = found.domains[found.worst].figures.kl_nats
    return found.mean.kl_nats, worst, found.mean.top1_agreement


if __name__ == "__main__":
    main()
