"""vLLM against transformers, compact against its twin: ``python -m benchmarks.serving.oracle``.

For each family the unpruned model, then each kind of table: largest difference of
log-probabilities over prompt and generated tokens, in FP32, to stock vLLM and to transformers on
the twin, and whether the generated tokens are the same. Last the trained model of this repository,
unpruned. ``--unpruned`` leaves the tables out. Exit 1 where an unpruned model is further from
transformers than 1e-4.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.fixtures import MODEL
from tests.patches.test_oracle import KINDS, apart, off, prompts, servable, tables_of
from tests.support.engine import ask
from tests.support.models import SERVED
from tests.support.references import reference_logprobs
from tests.support.twins import make_twins

BOUND: Final = 1e-4


def main(arguments: Sequence[str]) -> int:
    """Print a table."""
    print("| family | table | Δ to stock vLLM | Δ to transformers | same tokens |")
    print("|---|---|---|---|---|")
    kinds = () if "--unpruned" in arguments else KINDS
    worst = 0.0
    for family in (*SERVED, ""):
        with tempfile.TemporaryDirectory() as folder:
            source = servable(Path(folder) / "source", family) if family else MODEL
            own = unpruned(source)
            worst = max(worst, own)
            print(f"| {family or 'trained qwen3_moe'} | unpruned | - | {own:.1e} | - |", flush=True)
            for row in rows(family, source, Path(folder), kinds if family else ()):
                print(row, flush=True)
    return 1 if worst > BOUND else 0


def unpruned(source: Path) -> float:
    """Largest difference of a model's log-probabilities in vLLM from those in transformers."""
    (answer,) = ask([source], prompts())
    return off(answer, reference_logprobs(source, prompts(), {}))


def rows(family: str, source: Path, root: Path, kinds: Sequence[str]) -> list[str]:
    """One row per kind of table."""
    plans, folders = [], []
    for number, kind in enumerate(kinds):
        tables = tables_of(source, kind, number)
        compact, tied = root / f"{kind}-compact", root / f"{kind}-tied"
        dropped = make_twins(source, compact, tied, tables, seed=number)
        plans.append((kind, compact, tied, dropped))
        folders += [compact, tied]
    if not folders:
        return []
    answers = dict(zip(folders, ask(folders, prompts()), strict=True))
    result = []
    for kind, compact, tied, dropped in plans:
        ours, stock = answers[compact], answers[tied]
        if isinstance(ours, str) or isinstance(stock, str):
            raise TypeError(f"{kind}: {ours if isinstance(ours, str) else stock}")
        far = off(ours, reference_logprobs(tied, prompts(), dropped))
        masked = any(dropped.values())
        same = [a.tokens for a in ours.answers] == [a.tokens for a in stock.answers]
        stock_words = ("can't mask", "-") if masked else (f"{apart(ours, stock):.1e}", str(same))
        result.append(f"| {family} | {kind} | {stock_words[0]} | {far:.1e} | {stock_words[1]} |")
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
