"""Compact in vLLM against its tied twin: ``python -m benchmarks.serving.oracle``.

For each family and kind of table: largest difference of log-probabilities over prompt and
generated tokens, in FP32, to stock vLLM and to transformers on the twin, and whether the generated
tokens are the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.patches.test_oracle import KINDS, apart, prompts, servable, tables_of
from tests.support.engine import ask
from tests.support.models import SERVED
from tests.support.references import reference_logprobs
from tests.support.twins import make_twins


def main() -> None:
    """Print a table."""
    print("| family | table | Δ to stock vLLM | Δ to transformers | same tokens |")
    print("|---|---|---|---|---|")
    for family in SERVED:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(family, Path(folder)):
                print(row, flush=True)


def rows(family: str, root: Path) -> list[str]:
    """One row per kind of table."""
    source = servable(root / "source", family)
    plans, folders = [], []
    for number, kind in enumerate(KINDS):
        tables = tables_of(source, kind, number)
        compact, tied = root / f"{kind}-compact", root / f"{kind}-tied"
        dropped = make_twins(source, compact, tied, tables, seed=number)
        plans.append((kind, compact, tied, dropped))
        folders += [compact, tied]
    answers = dict(zip(folders, ask(folders, prompts()), strict=True))
    result = []
    for kind, compact, tied, dropped in plans:
        ours, stock = answers[compact], answers[tied]
        if isinstance(ours, str) or isinstance(stock, str):
            raise TypeError(f"{kind}: {ours if isinstance(ours, str) else stock}")
        reference = reference_logprobs(tied, prompts(), dropped)
        pairs = [
            abs(float(a or 0) - b)
            for answer, row in zip(ours.answers, reference, strict=True)
            for a, b in zip(answer.prompt[1:], row, strict=True)
        ]
        masked = any(dropped.values())
        same = [a.tokens for a in ours.answers] == [a.tokens for a in stock.answers]
        stock_words = ("can't mask", "-") if masked else (f"{apart(ours, stock):.1e}", str(same))
        result.append(
            f"| {family} | {kind} | {stock_words[0]} | {max(pairs):.1e} | {stock_words[1]} |"
        )
    return result


if __name__ == "__main__":
    main()
