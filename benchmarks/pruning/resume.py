"""Kill -9 at random moments: ``python -m benchmarks.pruning.resume``.

Each trial kills one run, once, at a random moment after it began to work, resumes it, and compares
the hashes of all files with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.fixtures import CALIBRATION, MODEL
from moe_serve.checkpoint.manifest import Manifest
from moe_serve.checkpoint.staging import WORK


def main() -> None:
    """Print a row per trial; exit 1 when one differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    rng = random.Random(0)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        began = time.monotonic()
        run(options, root / "whole").wait()
        seconds = time.monotonic() - began
        whole = Manifest.load(root / "whole").files
        print("| trial | killed after s | steps done then | same hashes |\n|---|---|---|---|")
        for trial in range(options.trials):
            output = root / f"out-{trial}"
            after = rng.uniform(0.2, 0.95) * seconds
            while not killed(run(options, output), after):
                # It was quicker than the first run; a kill after the end shows nothing.
                shutil.rmtree(output)
                after *= 0.8
            steps = steps_done(root / f"out-{trial}.partial" / WORK / "journal.json")
            resumed = run(options, output).wait()
            same = resumed == 0 and Manifest.load(output).files == whole
            failures += not same
            print(f"| {trial + 1} | {after:.2f} | {steps} | {same} |", flush=True)
    sys.exit(bool(failures))


def killed(process: subprocess.Popen[bytes], after: float) -> bool:
    """Whether SIGKILL came before the run's own end."""
    time.sleep(after)
    process.kill()
    return process.wait() == -signal.SIGKILL


def steps_done(journal: Path) -> int:
    """Finished steps on record; 0 before there is a journal."""
    return len(json.loads(journal.read_text())["done"]) if journal.exists() else 0


def run(options: argparse.Namespace, output: Path) -> subprocess.Popen[bytes]:
    """Start a pruning run."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "moe_serve", "prune", str(options.model), str(output)),
            *("--keep", "0.5", "--calibration", str(CALIBRATION)),
            *("--tokens", str(options.tokens), "--sequence-length", "256"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main()
