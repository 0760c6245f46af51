"""Time of pruning against a plain forward pass: ``python -m benchmarks.pruning.time``.

The yardstick is what no method can do without: transformers' own forward over the same tokens in
FP32, without the output matrix, plus reading the checkpoint and writing the kept bytes once. Both
sides run in this process, in turn, ``--repeats`` times; the least time of each counts, and the
processor's seconds are given beside the clock's because they do not feel the neighbours.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.fixtures import CALIBRATION, MODEL
from moe_serve.calibration.stream import batches
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions, load_corpus
from moe_serve.pruning.request import DEFAULT_BATCH, PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds."""

    clock: float
    processor: float


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--texts", type=Path, default=CALIBRATION)
    parser.add_argument("--methods", nargs="*", default=["drop-reap", "block-heapr", "block-obs"])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=8192, help="per domain")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", type=int, default=0, help="show so many functions per method")
    options = parser.parse_args()
    texts = TextOptions(paths=(options.texts,), tokens=options.tokens, length=options.length)
    sides: dict[str, Callable[[Path], object]] = {
        "plain": lambda folder: plain(options.model, texts, options.keep, folder)
    }
    phases: dict[str, dict[str, float]] = {}

    def side(method: str) -> Callable[[Path], object]:
        def run(folder: Path) -> None:
            request = PruneRequest(
                model=options.model,
                output=folder / "out",
                texts=texts,
                selection=Selection(keep=options.keep, method=method),
            )
            phases[method] = prune(request, Silent()).seconds

        return run

    sides |= {method: side(method) for method in options.methods}
    least = {name: Took(float("inf"), float("inf")) for name in sides}
    for _ in range(options.repeats):
        for name, run in sides.items():
            took = measured(run)
            best = least[name]
            least[name] = Took(min(best.clock, took.clock), min(best.processor, took.processor))
    base = least["plain"]
    print("| run | clock s | ratio | processor s | ratio | calibrate, plan, apply (last) s |")
    print("|---|---|---|---|---|---|")
    for name, took in least.items():
        parts = ", ".join(f"{s:.1f}" for s in phases.get(name, {}).values())
        print(
            f"| {name} | {took.clock:.2f} | {took.clock / base.clock:.2f} | {took.processor:.2f} | "
            f"{took.processor / base.processor:.2f} | {parts} |",
            flush=True,
        )
    if options.profile:
        for name in options.methods:
            profile = cProfile.Profile(time.process_time)
            with tempfile.TemporaryDirectory() as folder:
                profile.runcall(sides[name], Path(folder))
            print(f"\n{name}:")
            pstats.Stats(profile).sort_stats("tottime").print_stats(options.profile)


def measured(run: Callable[[Path], object]) -> Took:
    """Run once in a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        clock, processor = time.perf_counter(), time.process_time()
        run(Path(folder))
        return Took(time.perf_counter() - clock, time.process_time() - processor)


@torch.inference_mode()
def plain(model: Path, texts: TextOptions, keep: float, folder: Path) -> None:
    """Load, tokenise, run forward, write."""
    checkpoint = open_checkpoint(model)
    corpus = load_corpus(checkpoint, texts)
    if corpus is None:
        raise SystemExit("no texts")
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).model
    for batch in batches(corpus.sequences, DEFAULT_BATCH, CPU):
        ids = torch.stack([torch.from_numpy(corpus.sequences.tokens[n]) for n in batch.sequences])
        decoder(ids, use_cache=False)
    experts = sum(checkpoint.expert_bytes().values())
    size = sum(entry.size for entry in checkpoint.tensors.values())
    with (folder / "kept").open("wb") as file:
        file.write(bytes(size - int((1 - keep) * experts)))
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
