"""Peak memory of pruning against file and layer size: ``python -m benchmarks.pruning.memory``.

Generates random models of the same layer size and growing depth, prunes each in a process of its
own, and prints peak resident memory beside the size of the file and of its largest layer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.fixtures import CALIBRATION, MODEL
from moe_serve.checkpoint.shards import ShardWriter, TensorSpec
from moe_serve.checkpoint.source import open_checkpoint

HIDDEN, EXPERTS, WIDTH, TOP_K = 1024, 32, 512, 4


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="*", type=int, default=[5, 20])
    parser.add_argument("--model", type=Path, nargs="*", default=[MODEL])
    parser.add_argument("--tokens", type=int, default=1024, help="per domain")
    options = parser.parse_args()
    print("| model | file MB | largest layer MB | peak resident MB | keep | seconds |")
    print("|---|---|---|---|---|---|")
    for path in options.model:
        report(path, options.tokens)
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / f"random-{layers}-layers"
            write_model(model, layers)
            report(model, options.tokens)


def report(model: Path, tokens: int) -> None:
    """Prune in a process of its own and print a row."""
    checkpoint = open_checkpoint(model)
    size = sum(entry.size for entry in checkpoint.tensors.values())
    layer = max(
        sum(e.size for e in checkpoint.layer_tensors(i)) for i in range(checkpoint.shape.layers)
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "moe_serve", "prune", str(model), f"{folder}/out"),
            *("--keep", "0.5", "--calibration", str(CALIBRATION), "--tokens", str(tokens)),
            *("--sequence-length", "256", "--json"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    seconds = sum(found["seconds"].values())
    print(
        f"| {model.name} | {size / 1e6:,.0f} | {layer / 1e6:,.1f} | "
        f"{found['peak_rss_bytes'] / 1e6:,.0f} | 50 % | {seconds:.0f} |",
        flush=True,
    )


def write_model(path: Path, layers: int) -> None:
    """A random Qwen3-MoE in BF16, written tensor by tensor, with the fixture's tokenizer."""
    path.mkdir()
    config = json.loads((MODEL / "config.json").read_text()) | {
        "hidden_size": HIDDEN,
        "num_experts": EXPERTS,
        "moe_intermediate_size": WIDTH,
        "num_experts_per_tok": TOP_K,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((MODEL / name).read_bytes())
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        attention = {"q_proj": (512, HIDDEN), "k_proj": (128, HIDDEN), "v_proj": (128, HIDDEN)}
        attention["o_proj"] = (HIDDEN, 512)
        shapes |= {f"{prefix}self_attn.{n}.weight": s for n, s in attention.items()}
        shapes |= {f"{prefix}self_attn.{n}_norm.weight": (64,) for n in "qk"}
        shapes |= {f"{prefix}{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
        shapes[f"{prefix}mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            stem = f"{prefix}mlp.experts.{expert}."
            shapes |= {f"{stem}{n}_proj.weight": (WIDTH, HIDDEN) for n in ("gate", "up")}
            shapes[f"{stem}down_proj.weight"] = (HIDDEN, WIDTH)
    runs = [(TensorSpec(name=n, dtype="BF16", shape=s),) for n, s in shapes.items()]
    writer = ShardWriter(path, runs, shard_bytes=500_000_000)
    writer.write_index()
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator) * 0.03
        writer.write(name, (weight + 1 if "norm" in name else weight).to(torch.bfloat16))


if __name__ == "__main__":
    main()
