"""Peak memory of pruning against file and layer size: ``python -m benchmarks.pruning.memory``.

Generates random models of the same layer size and growing depth, prunes each in a process of its
own, and prints peak resident memory beside the size of the file and of its largest layer, and what
the dry run said beforehand. A file of 8 GB whose layers are 0.4 GB::

    python -m benchmarks.pruning.memory --layers 20 --hidden 2048 --experts 64 --width 512 --model
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.fixtures import CALIBRATION, MODEL
from moe_serve.checkpoint.shards import ShardWriter, TensorSpec
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.pruning.forecasts.work import Sizes as Headers

TOP_K = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a generated layer."""

    hidden: int
    experts: int
    width: int


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="*", type=int, default=[5, 20])
    parser.add_argument("--model", type=Path, nargs="*", default=[MODEL])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--tokens", type=int, default=1024, help="per domain")
    options = parser.parse_args()
    sizes = Sizes(options.hidden, options.experts, options.width)
    print(
        "| model | file MB | largest layer MB | the same in FP32 MB | peak resident MB "
        "| forecast MB | seconds | forecast s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for path in options.model:
        report(path, options.tokens, options.method)
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / f"random-{layers}-layers"
            write_model(model, layers, sizes)
            report(model, options.tokens, options.method)


def report(model: Path, tokens: int, method: str) -> None:
    """Prune in a process of its own and print a row."""
    checkpoint = open_checkpoint(model)
    sizes = Headers.of(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "moe_serve", "prune", str(model), f"{folder}/out"),
            *("--keep", "0.5", "--calibration", str(CALIBRATION), "--tokens", str(tokens)),
            *("--sequence-length", "256", "--method", method, "--json"),
        ]
        said, found = output([*command, "--dry-run"]), output(command)
    print(
        f"| {model.name} | {sizes.total_bytes / 1e6:,.0f} | {sizes.layer_bytes / 1e6:,.1f} | "
        f"{4 * sizes.layer_weights / 1e6:,.1f} | {found['peak_rss_bytes'] / 1e6:,.0f} | "
        f"{said['peak_memory_bytes'] / 1e6:,.0f} | {sum(found['seconds'].values()):.0f} | "
        f"{said['seconds']:.0f} |",
        flush=True,
    )


def output(command: list[str]) -> dict[str, Any]:
    """What a command prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def write_model(path: Path, layers: int, sizes: Sizes) -> None:
    """A random Qwen3-MoE in BF16, written tensor by tensor, with the fixture's tokenizer."""
    path.mkdir()
    config = json.loads((MODEL / "config.json").read_text()) | {
        "hidden_size": sizes.hidden,
        "num_experts": sizes.experts,
        "moe_intermediate_size": sizes.width,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((MODEL / name).read_bytes())
    hidden = sizes.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        attention = {"q_proj": (512, hidden), "k_proj": (128, hidden), "v_proj": (128, hidden)}
        attention["o_proj"] = (hidden, 512)
        shapes |= {f"{prefix}self_attn.{n}.weight": s for n, s in attention.items()}
        shapes |= {f"{prefix}self_attn.{n}_norm.weight": (64,) for n in "qk"}
        shapes |= {f"{prefix}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        shapes[f"{prefix}mlp.gate.weight"] = (sizes.experts, hidden)
        for expert in range(sizes.experts):
            stem = f"{prefix}mlp.experts.{expert}."
            shapes |= {f"{stem}{n}_proj.weight": (sizes.width, hidden) for n in ("gate", "up")}
            shapes[f"{stem}down_proj.weight"] = (hidden, sizes.width)
    runs = [(TensorSpec(name=n, dtype="BF16", shape=s),) for n, s in shapes.items()]
    writer = ShardWriter(path, runs, shard_bytes=500_000_000)
    writer.write_index()
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator) * 0.03
        writer.write(name, (weight + 1 if "norm" in name else weight).to(torch.bfloat16))


if __name__ == "__main__":
    main()
