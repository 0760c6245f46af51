"""How many faults the tests see: ``python -m benchmarks.mutation [--sample 250]``.

mutmut plants one small fault at a time (a sign, a bound, a constant, an argument left out) into the
pure parts of the pruner, the rollout's statistics and the plugin's table, in a copy of the last
commit, and runs the tests that reach it. A sample is drawn with a seed from all of them. Printed:
the share found per file, then each fault that no test saw; those that change nothing (``SAME``), or
only the words of a message, are named apart and not counted. Leave ``MUTANTS`` alone on disk
to look at one: ``mutmut show NAME`` there.

mutmut is no dependency of the project: it is installed, pinned, into a venv of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
PIN: Final = "mutmut==3.8.1"
MUTANTS: Final = ROOT / "build" / "mutation"
TESTED: Final = {
    "moe_serve/pruning/methods/alignment.py": ("tests/pruning/methods/test_alignment.py",),
    "moe_serve/pruning/methods/allocation.py": ("tests/pruning/methods/test_allocation.py",),
    "moe_serve/pruning/methods/coefficients.py": ("tests/pruning/methods/test_coefficients.py",),
    "moe_serve/pruning/methods/grouping.py": ("tests/pruning/methods/test_grouping.py",),
    "moe_serve/pruning/methods/groups.py": ("tests/pruning/methods/test_groups.py",),
    "moe_serve/pruning/methods/obs.py": ("tests/pruning/methods/test_obs.py",),
    "moe_serve/pruning/methods/reservoir.py": ("tests/pruning/methods/test_reservoir.py",),
    "moe_serve/pruning/methods/similarity.py": ("tests/pruning/methods/test_similarity.py",),
    "moe_serve/pruning/methods/tiles.py": ("tests/pruning/methods/test_tiles.py",),
    "moe_serve/pruning/plan.py": ("tests/pruning/test_plan.py",),
    "moe_serve/rollout/decision.py": (
        "tests/rollout/test_decision.py",
        "tests/rollout/test_limits.py",
        "tests/rollout/test_quality.py",
        "tests/rollout/test_waiting.py",
    ),
    "moe_serve/rollout/guards.py": (
        "tests/rollout/test_decision.py",
        "tests/rollout/test_quality.py",
        "tests/rollout/test_waiting.py",
    ),
    "moe_serve/rollout/sequential.py": (
        "tests/rollout/test_published.py",
        "tests/rollout/test_sequential.py",
    ),
    "moe_serve/rollout/vitals.py": ("tests/rollout/test_vitals.py",),
    "moe_serve/rollout/window.py": (
        "tests/rollout/test_decision.py",
        "tests/rollout/test_limits.py",
        "tests/rollout/test_window.py",
    ),
    "moe_serve_vllm/table.py": (
        "tests/patches/test_remap.py",
        "tests/patches/test_table.py",
    ),
}
"""File that faults are planted in → tests that have to see them."""
SAME: Final = {
    "centred = [(h - h.mean(dim=0, )).T": "a mean per column is spread over the rows either way",
    "normalize(mixture.hidden(u, tokens).T, ) for": "dim=1 is the default",
    "left < 1.8 * alive_nI.shape[1]": "when arrays shrink is a matter of time, not of numbers",
    "(n - k) * math.log1p(+rate)": "Newton's method comes in from further outside",
    "gap = (top - floor) * n": "Newton's method comes in from further outside",
    "better = candidate <= result_K": "of two ways that cost the same, either will do",
    "if (width <= _FP64_WIDTH) or True": "wide experts in FP64: memory, not numbers",
    "while len(self._looks) >= 1 and": "the look just taken is never older than the span",
    "np.asarray(v, dtype=None)": "callers give whole numbers or FP64, which come out the same",
    "np.asarray(v, )": "callers give whole numbers or FP64, which come out the same",
    "np.asarray(mean, )": "callers give whole numbers or FP64, which come out the same",
    "x = np.asarray(x, )": "callers give FP64",
    "x = np.asarray(x, dtype=None)": "callers give FP64",
    "if x.size == 1:": "one value says nothing at any level, and of none comes NaN, which loses",
    "if step < 1e-12 * p:": "one round more of Newton's method",
    'einsum("SG,GSD->SD"': "the letters of a sum are free",
    "leaders_of(score_N, None)": "all of them is what a slice without an end has, too",
    "slice(self._cut)": "a slice begins at zero",
    "sorted=False)": "a processor sorts them all the same",
    "diagonal()[gone] = 2.0": "any number above zero makes a pivot harmless",
    "torch.ones(short, )": "one is one in FP32, too",
    "torch.zeros(experts, 1, dtype=None": "zero is zero in FP32, and what is added to it is FP64",
    "np.zeros((experts, most + 1), )": "memory, not numbers",
    "gone_nI.long().argsort(dim=1, )": "a processor sorts small rows stably all the same",
    'mode="JSON"': "what a plan holds is the same in pydantic's other mode",
    "np.clip(m, None, 1.0)": "below zero by more than rounding it is impossible already",
}
"""Part of a faulty line → why no test can, or has to, see it."""
_SENTENCE: Final = re.compile(r'(f?"[^"]*" ?)+,?')
_SEEN: Final = {1, 3, 24, 36, 152, 255}
"""Exit codes of a fault that tests saw: a failure, or a limit of time or processor."""


def main() -> int:
    """Plant, run, print; 1 where too few are seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=250, help="of all faults; 0: every one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.85, help="share that has to be seen")
    options = parser.parse_args()
    program = prepare()
    plant(program)
    every = sorted(results())
    drawn = (
        every if not options.sample else random.Random(options.seed).sample(every, options.sample)
    )
    mutate(program, *drawn)
    found = results()
    if missing := [name for name in drawn if found[name] is None]:
        raise SystemExit(
            f"mutation: {len(missing)} faults were not run, first {missing[0]}; "
            f"run mutmut by hand in {MUTANTS}"
        )
    unseen = {n: change(program, n) for n in sorted(drawn) if found[n] not in _SEEN}
    same = {name: why for name, text in unseen.items() if (why := excused(text))}
    counted = [name for name in drawn if name not in same]
    files = Counter(name.rpartition(".")[0] for name in counted)
    missed = Counter(name.rpartition(".")[0] for name in unseen if name not in same)
    print("| file | faults | seen |\n|---|---|---|")
    for file, count in sorted(files.items()):
        print(f"| `{file}` | {count} | {1 - missed[file] / count:.0%} |")
    share = 1 - missed.total() / len(counted)
    print(f"| all, of {len(every)} | {len(counted)} | {share:.0%} |\n")
    for name in sorted(unseen, key=lambda name: (name in same, name)):
        why = f": {same[name]}" if name in same else ""
        print(f"- {'not counted' if why else 'not seen'}, `{name}`{why}: {unseen[name]}")
    return int(share < options.least)


def excused(text: str) -> str:
    """Why a fault that nobody saw is none; empty where it is one."""
    before = text.partition("→")[0]
    if "remedy=" in before or "where=" in before or _SENTENCE.fullmatch(before.strip("` ")):
        return "words of a message"
    return next((why for part, why in SAME.items() if part in text), "")


def prepare() -> Path:
    """A copy of the last commit in ``MUTANTS``, and mutmut beside the project's libraries."""
    shutil.rmtree(MUTANTS, ignore_errors=True)
    MUTANTS.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    ).stdout
    subprocess.run(["tar", "-x"], cwd=MUTANTS, input=archive, check=True)
    # mutmut knows a module by its path.
    shutil.move(MUTANTS / "patches" / "moe_serve_vllm", MUTANTS / "moe_serve_vllm")
    tests = sorted({test for several in TESTED.values() for test in several})
    settings = {
        "source_paths": TESTED,
        "pytest_add_cli_args_test_selection": tests,
        "also_copy": ("moe_serve", "moe_serve_vllm", "tests", "benchmarks", "docs"),
    }
    lines = [f"{key}=\n    " + "\n    ".join(values) for key, values in settings.items()]
    (MUTANTS / "setup.cfg").write_text("[mutmut]\n" + "\n".join(lines) + "\n")
    venv = ROOT / "build" / "mutation-venv"
    if not (venv / "bin" / "mutmut").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin" / "pip", "install", "--quiet", PIN], check=True)
    site = next((venv / "lib").glob("python*/site-packages"))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin" / "mutmut"


def plant(program: Path) -> None:
    """Write all faults, and run the tests on none; that nothing is called so, mutmut says."""
    mutate(program, "none", quiet=True)


def mutate(program: Path, *names: str, quiet: bool = False) -> None:
    """Run the tests on these faults, one at a time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    subprocess.run(
        [program, "run", "--max-children", "1", *names],
        cwd=MUTANTS,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if quiet else None,
        check=False,  # A fault that nobody sees is no failure of the tool.
    )


def results() -> dict[str, int | None]:
    """Fault → exit code of its tests; ``None``: not run."""
    found: dict[str, int | None] = {}
    for path in (MUTANTS / "mutants").rglob("*.meta"):
        found |= json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
    if not found:
        raise SystemExit("mutation: no fault was planted; run mutmut by hand in build/mutation")
    return found


def change(program: Path, name: str) -> str:
    """A fault in a line: what stood there, and what stands there now."""
    shown = subprocess.run(
        [program, "show", name], cwd=MUTANTS, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    lines = [x for x in shown if x[:1] in {"+", "-"} and x[:3] not in {"+++", "---"}]
    before, after = ([x[1:].strip() for x in lines if x[0] == sign] for sign in "-+")
    return f"`{' '.join(before)}` → `{' '.join(after)}`"


if __name__ == "__main__":
    sys.exit(main())
