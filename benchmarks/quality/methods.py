"""Every published rule beside ours at equal bytes: ``python -m benchmarks.quality.methods``.

Each seed draws its calibration tokens once, the same for all contestants; all are measured on the
same held-out tokens. Statistics are gathered once for ours and once for published rules, which get
the gradients of every token; our own runs ask for fewer. The table goes to stdout, progress to
stderr; with ``--json`` all figures go to a file after every run, from which a stopped benchmark
continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.fixtures import CALIBRATION, HELDOUT, MODEL
from benchmarks.quality.contestants import Contestant, contestants
from benchmarks.quality.summary import Run, markdown, summarise, to_json
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import MoeServeError
from moe_serve.evaluation.comparison import compare
from moe_serve.files import write_json
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.device import device_named
from moe_serve.pruning.gathering import calibrate
from moe_serve.pruning.methods.registry import gradient_tokens
from moe_serve.pruning.request import DEFAULT_BATCH, PruneRequest
from moe_serve.pruning.run import prune


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What is the same for every run."""

    model: Path
    calibration: tuple[Path, ...]
    heldout: TextOptions
    tokens: int
    length: int
    statistics: Path
    """One folder per seed."""
    work: Path
    device: torch.device

    def texts(self, seed: int) -> TextOptions:
        """The calibration tokens of a seed."""
        return TextOptions(
            paths=self.calibration, tokens=self.tokens, length=self.length, seed=seed
        )

    def observed(self, seed: int, contestant: Contestant) -> Path:
        """The statistics of a seed, gathered where they are missing.

        Published rules get the gradients of all tokens, ours of those that its own run takes.
        """
        gradients, whose = sys.maxsize, "published"
        if contestant.kind == "ours":
            hidden = open_checkpoint(self.model).shape.hidden
            gradients = gradient_tokens(contestant.selection.method, hidden)
            whose = f"ours-{gradients}"
        folder = self.statistics / f"seed-{seed}-{self.tokens}x{self.length}-{whose}"
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            begin = time.monotonic()
            texts = self.texts(seed)
            calibrate(
                self.model,
                folder,
                texts,
                self.device,
                DEFAULT_BATCH,
                Silent(),
                gradients=gradients,
            )
            _tell(f"seed {seed}: calibrated in {time.monotonic() - begin:.1f} s")
        return folder

    def run(self, contestant: Contestant, keep: float, seed: int) -> Run:
        """Prune and measure."""
        statistics = self.observed(seed, contestant)
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            output = Path(folder) / "pruned"
            request = PruneRequest(
                model=self.model,
                output=output,
                texts=self.texts(seed),
                selection=contestant.at(keep, seed),
                statistics=statistics,
                device=self.device,
            )
            size = prune(request, Silent()).manifest.expert_bytes
            found = compare(
                self.model,
                output,
                self.heldout,
                self.device,
                DEFAULT_BATCH,
                Silent(),
                reference=self.work / "reference.f32",
            )
        worst = found.domains[found.worst].figures
        return Run(
            label=contestant.label,
            kind=contestant.kind,
            keep=keep,
            seed=seed,
            bytes_kept=size.kept / size.original,
            kl_mean=found.mean.kl_nats,
            kl_worst=worst.kl_nats,
            worst_domain=found.worst,
            top1=found.mean.top1_agreement,
            seconds=time.monotonic() - begin,
        )


def main() -> int:
    """Run all, print one table per budget."""
    options = _options()
    try:
        rows = contestants(options.methods, refits=options.refits)
        settings = _settings(options)
        with tempfile.TemporaryDirectory(prefix="moe-serve-bench-") as folder:
            bench = Bench(
                model=options.model,
                calibration=tuple(options.calibration),
                heldout=TextOptions(
                    paths=tuple(options.heldout),
                    tokens=options.heldout_tokens,
                    length=options.length,
                ),
                tokens=options.tokens,
                length=options.length,
                statistics=options.statistics or Path(folder) / "statistics",
                work=Path(folder),
                device=device_named(options.device),
            )
            runs = _measure(bench, rows, options, settings)
    except MoeServeError as exc:
        print(exc, file=sys.stderr)
        return 2
    for keep in options.keep:
        table, best = summarise(runs, keep)
        print(f"\n{keep:.0%} of the experts' bytes kept, {options.seeds} seed(s)\n")
        print(markdown(table, best))
    return 0


def _measure(
    bench: Bench, rows: list[Contestant], options: argparse.Namespace, settings: dict[str, Any]
) -> list[Run]:
    """All runs; those in the file of an earlier call with the same settings are taken over."""
    plan = [(s, k, row) for s in range(options.seeds) for k in options.keep for row in rows]
    runs = _earlier(options.json, settings)
    known = {(run.label, run.keep, run.seed) for run in runs}
    left = [(s, k, row) for s, k, row in plan if (row.label, k, s) not in known]
    begin = time.monotonic()
    for number, (seed, keep, row) in enumerate(left, 1):
        try:
            run = bench.run(row, keep, seed)
        except MoeServeError as exc:
            _tell(f"[{number}/{len(left)}] {row.label} at {keep:.0%}: left out, {exc}")
            continue
        runs.append(run)
        each = (time.monotonic() - begin) / number
        _tell(
            f"[{number}/{len(left)}] seed {seed}, {keep:.0%}, {row.label}: KL {run.kl_mean:.4f}, "
            f"worst {run.kl_worst:.4f} ({run.worst_domain}), {run.seconds:.1f} s; "
            f"{each * (len(left) - number) / 60:.1f} min left"
        )
        if options.json:
            write_json(options.json, to_json(runs, settings))
    wanted = {(row.label, k, s) for s, k, row in plan}
    return [run for run in runs if (run.label, run.keep, run.seed) in wanted]


def _earlier(path: Path | None, settings: dict[str, Any]) -> list[Run]:
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        raise MoeServeError(
            "holds figures of other settings", where=str(path), remedy="name another file"
        )
    return [Run(**run) for run in found["runs"]]


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What figures depend on beyond contestant, budget and seed; no paths of this machine."""
    return {
        "model": open_checkpoint(options.model).fingerprint(),
        "calibration": [path.name for path in options.calibration],
        "heldout": [path.name for path in options.heldout],
        "tokens": options.tokens,
        "heldout_tokens": options.heldout_tokens,
        "sequence_length": options.length,
    }


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, nargs="+", default=[CALIBRATION])
    parser.add_argument("--heldout", type=Path, nargs="+", default=[HELDOUT])
    parser.add_argument("--methods", nargs="*", default=[], help="all when left out")
    parser.add_argument(
        "--refits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run each published rule with our re-fit as well",
    )
    parser.add_argument("--keep", nargs="*", type=float, default=[0.75, 0.5])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192, help="to calibrate on, per domain")
    parser.add_argument("--heldout-tokens", type=int, default=8192, help="per domain")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--statistics", type=Path, help="keep the statistics here, by seed")
    parser.add_argument("--json", type=Path, help="write all figures here; continued if it exists")
    parser.add_argument("--device")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
