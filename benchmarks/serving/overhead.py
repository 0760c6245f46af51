"""What blocks cost an engine: ``python -m benchmarks.serving.overhead [--clock wall]``.

All engines are in one process and take turns on the same prompts, in random order; a ratio is that
of one turn, and what is printed is the median over the turns, the ends in brackets. Where a weight
lies in memory changes the speed of decoding by up to a fifth, so engines with equal experts use the
same memory for them; the last row, of two engines for one checkpoint, says what is left of chance.
Prefill is the step that takes all prompts, decode the median of those after it. The default clock
is the process's processor time, which other work on the machine changes less; ``--clock wall`` for
an idle machine or a GPU.

In FP32 a native checkpoint and a compact one of the same experts must generate the same tokens. In
BF16 their routers, with more rows in one than in the other, round differently.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from tests.support.models import make_model
from tests.support.twins import Table, make_twins

Clock = Callable[[], float]
CLOCKS: Final[dict[str, Clock]] = {"processor": time.process_time, "wall": time.perf_counter}
EXPERTS, TOP_K, WIDTH, HIDDEN, LAYERS, DROPPED = 16, 4, 512, 512, 4, 4
PROMPTS, LENGTH, GENERATED = 4, 256, 32
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """Seconds that one engine took for all prompts and for a token after each; what it said."""

    prefill: float
    decode: float
    tokens: tuple[tuple[int, ...], ...]


def settings(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Add clock and number format, parse, and keep vLLM in this process and quiet."""
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="processor")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Print the table; 1 if native and compact did not generate alike in FP32."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9)
    given = settings(parser, arguments)
    clock = CLOCKS[given.clock]
    with tempfile.TemporaryDirectory(prefix="moe-serve-bench-") as folder:
        models = make_models(Path(folder) / "speed", DTYPES[given.dtype])
        turns = take_turns(models, given.turns, clock, given.dtype)
        for line in speed_table(turns):
            print(line, flush=True)
        alike = all(
            a.tokens == b.tokens for a, b in zip(turns["native"], turns["whole"], strict=True)
        )
        print(f"\nnative and compact generated {'the same' if alike else 'other'} tokens")
    return 0 if alike or given.dtype != "float32" else 1


def tables(lists: list[list[int] | None], width: int) -> dict[int, Table]:
    """The same table for every layer."""
    blocks = 1 + max(b for blocks in lists for b in blocks or ())
    table = {"width": width, "blocks": blocks, "experts": lists}
    return {layer: table for layer in range(LAYERS)}  # noqa: C420 - they are only read


def consecutive(counts: Sequence[int]) -> list[list[int] | None]:
    """As many blocks for each expert, numbered in order."""
    starts = [sum(counts[:e]) for e in range(len(counts))]
    return [list(range(s, s + c)) for s, c in zip(starts, counts, strict=True)]


def ragged(most: int) -> list[int]:
    """From none to ``most`` blocks per expert, half of all on average; the same every time."""
    rng = random.Random(most)
    counts = [most // 2] * EXPERTS
    for _ in range(EXPERTS * most):
        a, b = rng.sample(range(EXPERTS), 2)
        if counts[a] > 0 and counts[b] < most:
            counts[a] -= 1
            counts[b] += 1
    return counts


def make_original(path: Path, dtype: torch.dtype, *, hidden: int, width: int, layers: int) -> Path:
    """A random model."""
    return make_model(
        path,
        "qwen3_moe",
        experts=EXPERTS,
        top_k=TOP_K,
        width=width,
        dtype=dtype,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.05,
    )


def make_models(root: Path, dtype: torch.dtype) -> dict[str, Path]:
    """The original and what is compared with it."""
    source = make_original(root / "original", dtype, hidden=HIDDEN, width=WIDTH, layers=LAYERS)
    whole: list[list[int] | None] = [None if e < DROPPED else [e - DROPPED] for e in range(EXPERTS)]
    wanted = {"whole": tables(whole, WIDTH)}
    for most in (2, 4, 8):
        wanted[f"ragged {most}"] = tables(consecutive(ragged(most)), WIDTH // most)
    for each in (1, 2, 4, 8):
        wanted[f"even {each}"] = tables(consecutive([each] * EXPERTS), WIDTH // 2 // each)
    models = {"original": source}
    for name, table in wanted.items():
        folder = root / name.replace(" ", "-")
        make_twins(source, folder, root / f"{folder.name}-tied", table)
        models[name] = folder
    models["native"] = make_native(models["whole"], root / "native")
    models["original again"] = models["original"]
    return models


def make_native(compact: Path, out: Path) -> Path:
    """The compact checkpoint's experts, with the router rows of those that were not dropped."""
    shutil.copytree(compact, out)
    config = json.loads((out / "config.json").read_text())
    table = config.pop("compact_experts")["layers"]
    names = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": EXPERTS - DROPPED}
    # transformers writes the count under either name.
    count = {"num_local_experts": EXPERTS - DROPPED} if "num_local_experts" in config else {}
    (out / "config.json").write_text(json.dumps(config | names | count))
    weights = load_file(out / "model.safetensors")
    for layer, entry in table.items():
        kept = torch.tensor([e for e, blocks in enumerate(entry["experts"]) if blocks is not None])
        gate = f"model.layers.{layer}.mlp.gate.weight"
        weights[gate] = weights[gate][kept].contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def start(model: Path, dtype: str) -> Any:
    """An engine in this process."""
    from vllm import LLM

    compact = "compact_experts" in json.loads((model / "config.json").read_text())
    options: dict[str, Any] = {"load_format": "moe_serve"} if compact else {}
    if not torch.cuda.is_available():
        options["kv_cache_memory_bytes"] = 64 << 20
    return LLM(
        model=str(model),
        dtype=dtype,
        enforce_eager=not torch.cuda.is_available(),
        max_model_len=LENGTH + GENERATED,
        max_num_batched_tokens=PROMPTS * LENGTH,
        max_num_seqs=PROMPTS,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.08,
        **options,
    )


def take_turns(
    models: dict[str, Path], turns: int, clock: Clock, dtype: str
) -> dict[str, list[Turn]]:
    """Let all engines answer, one after the other, as often as wanted."""
    names = list(models)
    engines = {name: start(models[name], dtype) for name in names}
    share(engines["native"], engines["whole"])
    share(engines["original"], engines["original again"])
    rng = random.Random(0)
    prompts = [[rng.randrange(1, 256) for _ in range(LENGTH)] for _ in range(PROMPTS)]
    for engine in engines.values():
        answer(engine, prompts, clock)
    taken: dict[str, list[Turn]] = {name: [] for name in names}
    for _ in range(turns):
        # Nobody always follows the same one.
        for name in rng.sample(names, len(names)):
            taken[name].append(answer(engines[name], prompts, clock))
    for engine in engines.values():
        engine.llm_engine.engine_core.shutdown()
    return taken


def share(one: Any, other: Any) -> None:
    """Let two engines in this process use the same memory for the experts, which are equal."""
    (theirs,) = one.apply_model(lambda model: dict(model.named_parameters()))
    (ours,) = other.apply_model(lambda model: dict(model.named_parameters()))
    for name, parameter in ours.items():
        if name.endswith((".w13_weight", ".w2_weight")):
            if not torch.equal(parameter.data, theirs[name].data):
                raise ValueError(f"{name} differs")
            parameter.data = theirs[name].data


def answer(engine: Any, prompts: list[list[int]], clock: Clock) -> Turn:
    """All prompts at once; every step is timed."""
    from vllm import SamplingParams

    core = engine.llm_engine
    sampling = SamplingParams(max_tokens=GENERATED, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        core.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    seconds: list[float] = []
    finished: dict[str, tuple[int, ...]] = {}
    gc.collect()
    gc.disable()
    while core.has_unfinished_requests():
        began = clock()
        outputs = core.step()
        seconds.append(clock() - began)
        finished |= {o.request_id: tuple(o.outputs[0].token_ids) for o in outputs if o.finished}
    gc.enable()
    tokens = tuple(finished[str(number)] for number in range(len(prompts)))
    return Turn(prefill=seconds[0], decode=statistics.median(seconds[1:]), tokens=tokens)


def speed_table(turns: dict[str, list[Turn]]) -> list[str]:
    """Tokens per second against the reference's, prefill and decode apart."""
    rows = [("whole experts, 4 of 16 dropped", "whole", "native")]
    for most in (2, 4, 8):
        label = f"half the bytes, 0 to {most} blocks of {WIDTH // most}"
        rows.append((label, f"ragged {most}", "original"))
    for each in (1, 2, 4, 8):
        label = f"half the bytes, {each} blocks of {WIDTH // 2 // each} each"
        rows.append((label, f"even {each}", "original"))
    rows += [(f"the same, {each} blocks against 1", f"even {each}", "even 1") for each in (2, 4, 8)]
    rows.append(("(the original itself)", "original again", "original"))
    lines = ["| compact | against | prefill tokens/s | decode tokens/s |", "|---|---|---|---|"]
    for label, name, reference in rows:
        pairs = list(zip(turns[reference], turns[name], strict=True))
        cells = [
            told([theirs.prefill / ours.prefill for theirs, ours in pairs]),
            told([theirs.decode / ours.decode for theirs, ours in pairs]),
        ]
        lines.append(f"| {label} | {reference} | {cells[0]} | {cells[1]} |")
    return lines


def told(ratios: Sequence[float]) -> str:
    """The median and the ends."""
    return f"{statistics.median(ratios):.3f}× ({min(ratios):.3f} to {max(ratios):.3f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
