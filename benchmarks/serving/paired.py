"""Whole experts against native, step beside step: ``python -m benchmarks.serving.paired``.

``benchmarks.serving.overhead`` compares whole turns, between which the machine changes; there two
engines for the same checkpoint differ by a tenth. Here both engines of a pair answer the same
prompts at once and take their steps alternately, who is first by chance, so a ratio is that of two
neighbouring steps. Where a weight lies in memory changes the speed too: engines of a pair use the
same memory for all parameters that are equal, and the pair is started afresh several times. Printed
is the median over the turns of all starts, with a 95 % interval from drawing starts, and
turns within them, again (4,000 times). The last row, two engines for one checkpoint, says what is
left of chance.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.serving.overhead import (
    CLOCKS,
    DTYPES,
    GENERATED,
    LENGTH,
    PROMPTS,
    Clock,
    make_models,
    settings,
    start,
)

PAIRS: Final = (
    ("whole experts, 4 of 16 dropped", "whole", "native"),
    ("itself", "again", "native"),
)
_DRAWS: Final = 4000


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--turns", type=int, default=12)
    given = settings(parser, arguments)
    print("| compact | against | prefill tokens/s | decode tokens/s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="moe-serve-bench-") as folder:
        models = make_models(Path(folder), DTYPES[given.dtype])
        models["again"] = models["native"]
        for label, name, reference in PAIRS:
            rng = random.Random(0)
            prefill: list[list[float]] = []
            decode: list[list[float]] = []
            for _ in range(given.starts):
                engines = (start(models[reference], given.dtype), start(models[name], given.dtype))
                share_all(*engines)
                ratios = [turn(engines, rng, CLOCKS[given.clock]) for _ in range(given.turns + 1)]
                # The first one warms up.
                prefill.append([first for first, _ in ratios[1:]])
                decode.append([after for _, after in ratios[1:]])
                for engine in engines:
                    engine.llm_engine.engine_core.shutdown()
                del engines
                gc.collect()
            print(f"| {label} | {reference} | {told(prefill)} | {told(decode)} |", flush=True)
    return 0


def turn(engines: tuple[Any, Any], rng: random.Random, clock: Clock) -> tuple[float, float]:
    """The same prompts to both, steps taken alternately.

    Returns:
        Reference's seconds over the other's: of the step that takes all prompts, and the median
        over the steps after it.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=GENERATED, temperature=0.0, ignore_eos=True)
    prompts = [[rng.randrange(1, 256) for _ in range(LENGTH)] for _ in range(PROMPTS)]
    cores = [engine.llm_engine for engine in engines]
    for core in cores:
        for number, prompt in enumerate(prompts):
            core.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    ratios: list[float] = []
    gc.collect()
    gc.disable()
    while any(core.has_unfinished_requests() for core in cores):
        seconds = [0.0, 0.0]
        for which in rng.sample((0, 1), 2):
            began = clock()
            cores[which].step()
            seconds[which] = clock() - began
        ratios.append(seconds[0] / seconds[1])
    gc.enable()
    return ratios[0], statistics.median(ratios[1:])


def share_all(one: Any, other: Any) -> None:
    """Let the second engine use the first one's memory for every parameter that is equal."""
    (theirs,) = one.apply_model(lambda model: dict(model.named_parameters()))
    (ours,) = other.apply_model(lambda model: dict(model.named_parameters()))
    for name, parameter in ours.items():
        found = theirs.get(name)
        if found is not None and found.shape == parameter.shape and found.equal(parameter):
            parameter.data = found.data


def interval(starts: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of medians of starts, and turns within them, drawn again."""
    rng = random.Random(seed)
    medians = sorted(
        statistics.median(
            value
            for chosen in rng.choices(starts, k=len(starts))
            for value in rng.choices(chosen, k=len(chosen))
        )
        for _ in range(_DRAWS)
    )
    return medians[round(0.025 * _DRAWS)], medians[round(0.975 * _DRAWS) - 1]


def told(starts: Sequence[Sequence[float]]) -> str:
    """The median and its interval."""
    low, high = interval(starts)
    middle = statistics.median(value for values in starts for value in values)
    return f"{middle:.3f}× ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
