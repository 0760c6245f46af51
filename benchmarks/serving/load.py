"""What loading costs beside stock: ``python -m benchmarks.serving.load``.

A compact checkpoint by our loader, which checks everything, against its tied twin by stock's: in
vectors of 2048, with experts of 1024 neurons, two layers. No engine is started: vLLM builds the
model, and its loader's own call is timed. In each round all are loaded in random order, and each is
compared with the tied one of its round, by seconds per byte of its file; printed is the median over
the rounds with a 95 % interval from drawing rounds again. The first round reads the files into the
page cache and does not count.

Memory is that of one load in a fresh process: what it held at most beyond what it held before, in
anonymous memory, against the bytes of the model's parameters. 1.00 is the parameters alone, 2.00
would be a second copy.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Final, Self

import torch

from benchmarks.serving.overhead import (
    CLOCKS,
    DTYPES,
    EXPERTS,
    Clock,
    consecutive,
    make_original,
    ragged,
    settings,
    tables,
)
from moe_serve.serving.ports import free_port
from tests.support.twins import make_twins

TIED: Final = "tied, by stock's loader"
_WIDTH: Final = 1024
_LAYERS: Final = 2
_DRAWS: Final = 4000


@dataclass(kw_only=True)
class Watched:
    """A stretch of time: how long it took, and how much anonymous memory was held at most."""

    clock: Clock
    seconds: float = 0.0
    before: int = 0
    most: int = 0
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Begin."""
        gc.collect()
        self.before = self.most = anonymous()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self.seconds = -self.clock()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self.seconds += self.clock()
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        self.most = max(self.most, anonymous())

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, anonymous())


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def main(arguments: Sequence[str]) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    given = settings(parser, arguments)
    with tempfile.TemporaryDirectory(prefix="moe-serve-load-") as folder:
        models = make_models(Path(folder), given.dtype)
        per_byte = rounds(models, given.rounds, CLOCKS[given.clock], given.dtype)
        print("| compact | seconds per byte, of stock's on the tied twin (95 %) |\n|---|---|")
        for name in models:
            if name != TIED:
                ratios = [a / b for a, b in zip(per_byte[name], per_byte[TIED], strict=True)]
                print(f"| {name} | {told(ratios)} |")
        print("\n| load | most memory held, of the parameters' bytes |\n|---|---|")
        for name, model in models.items():
            # A process for each: memory given back by one load would hide what the next takes.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                print(
                    f"| {name} | {pool.submit(held, model, given.dtype).result():.3f} |", flush=True
                )
    return 0


def make_models(root: Path, dtype: str) -> dict[str, Path]:
    """Compact forms of one model, and the tied one."""
    source = make_original(
        root / "source", DTYPES[dtype], hidden=2048, width=_WIDTH, layers=_LAYERS
    )
    wanted = {f"whole experts, {_WIDTH} neurons each": (consecutive([1] * EXPERTS), _WIDTH)}
    for most in (2, 8):
        label = f"0 to {most} blocks of {_WIDTH // most}"
        wanted[label] = (consecutive(ragged(most)), _WIDTH // most)
    models = {}
    for number, (label, (lists, width)) in enumerate(wanted.items()):
        table = {k: v for k, v in tables(lists, width).items() if k < _LAYERS}
        models[label] = root / str(number)
        make_twins(source, models[label], root / f"{number}-tied", table)
    models[TIED] = root / f"{number}-tied"
    return models


def rounds(models: dict[str, Path], count: int, clock: Clock, dtype: str) -> dict[str, list[float]]:
    """Seconds per byte of each model in each round."""
    found: dict[str, list[float]] = {name: [] for name in models}
    rng = random.Random(0)
    for number in range(count + 1):
        for name in rng.sample(list(models), len(models)):
            watched, _ = loaded(models[name], clock, dtype)
            if number:
                size = (models[name] / "model.safetensors").stat().st_size
                found[name].append(watched.seconds / size)
    return found


def held(model: Path, dtype: str) -> float:
    """Memory of one load against the parameters' bytes."""
    watched, size = loaded(model, time.perf_counter, dtype)
    return (watched.most - watched.before) / size


def loaded(model: Path, clock: Clock, dtype: str) -> tuple[Watched, int]:
    """Build a model and let its loader fill it: what that took, and the parameters' bytes."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    compact = "compact_experts" in json.loads((model / "config.json").read_text())
    given = EngineArgs(
        model=str(model),
        dtype=dtype,
        load_format="moe_serve" if compact else "auto",
        enforce_eager=True,
        skip_tokenizer_init=True,
    ).create_engine_config()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with set_current_vllm_config(given):
        _alone(device)
        with set_default_torch_dtype(DTYPES[dtype]), torch.device(device):
            built = initialize_model(vllm_config=given)
        loader = get_model_loader(given.load_config)
        with Watched(clock=clock) as watched:
            loader.load_weights(built, given.model_config)
    return watched, sum(p.numel() * p.element_size() for p in built.parameters())


@cache
def _alone(device: str) -> None:
    """One rank of one."""
    from vllm.distributed import parallel_state

    address = f"tcp://127.0.0.1:{free_port()}"
    backend = "gloo" if device == "cpu" else "nccl"
    parallel_state.init_distributed_environment(1, 0, address, 0, backend)
    parallel_state.initialize_model_parallel()


def told(ratios: Sequence[float], seed: int = 0) -> str:
    """The median and the middle 95 % of medians of the ratios drawn again."""
    rng = random.Random(seed)
    drawn = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(_DRAWS))
    low, high = drawn[round(0.025 * _DRAWS)], drawn[round(0.975 * _DRAWS) - 1]
    return f"{statistics.median(ratios):.3f}× ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
