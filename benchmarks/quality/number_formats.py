"""Pruning quantised models: tiles kept, tiles re-fitted, neurons chosen freely.

``python -m benchmarks.quality.number_formats`` quantises the fixture (attention and experts, round
to nearest, tiles and groups of 32 so that its 192-neuron experts have six) to each format, prunes
each to equal expert bytes in four ways and measures the KL against the quantised original and
against the BF16 one. The first rows are the BF16 model pruned.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from benchmarks.fixtures import CALIBRATION, HELDOUT, MODEL
from moe_serve.checkpoint.quantisation import Scheme
from moe_serve.checkpoint.quantisation.fp8 import Fp8
from moe_serve.checkpoint.quantisation.packed import Packed
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.evaluation.comparison import compare
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.gathering import calibrate
from moe_serve.pruning.request import DEFAULT_BATCH, PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection

_CPU: Final = torch.device("cpu")
_TILE: Final = 32
_INTEGERS: Final = {"num_bits": 4, "type": "int", "group_size": _TILE, "symmetric": True}
_GROUP: Final = {"bits": 4, "group_size": _TILE}
_ROWS: Final = {"num_bits": 8, "type": "float", "strategy": "channel"}


def _compressed(weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


FORMATS: Final[dict[str, tuple[Scheme, dict[str, Any]]]] = {
    "fp8-tiles": (
        Fp8(
            scale="weight_scale_inv",
            scale_dtype="F32",
            scale_dims=2,
            row_step=_TILE,
            column_step=_TILE,
        ),
        {"quant_method": "fp8", "weight_block_size": [_TILE, _TILE]},
    ),
    "fp8-rows": (
        Fp8(scale="weight_scale", scale_dtype="BF16", scale_dims=2, row_step=1, column_step=None),
        _compressed(_ROWS),
    ),
    "int4": (
        Packed(
            layout="compressed-tensors",
            bits=4,
            group=_TILE,
            scale_dtype="BF16",
            symmetric=True,
            stored_zero=False,
            shape_dtype="I64",
        ),
        _compressed(_INTEGERS),
    ),
    "gptq": (
        Packed(
            layout="GPTQ",
            bits=4,
            group=_TILE,
            scale_dtype="F16",
            symmetric=True,
            stored_zero=True,
            zero_offset=1,
            group_index=True,
        ),
        _GROUP | {"quant_method": "gptq", "sym": True, "desc_act": False},
    ),
    "awq": (
        Packed(
            layout="AWQ", bits=4, group=_TILE, scale_dtype="F16", symmetric=False, stored_zero=True
        ),
        _GROUP | {"quant_method": "awq", "zero_point": True, "version": "gemm"},
    ),
}
WAYS: Final = {
    "tiles byte for byte": (False, False),
    "tiles, W_down re-fitted": (True, False),
    "free neurons": (False, True),
    "free neurons, re-fitted": (True, True),
}
"""Whether W_down is re-fitted, and whether neurons are chosen freely and rounded again."""


def quantise(checkpoint: Checkpoint, target: Path, name: str) -> None:
    """Write the checkpoint with the matrices of attention and experts in a format."""
    scheme, settings = FORMATS[name]
    router = {checkpoint.family.gate_name(i) for i in range(checkpoint.shape.layers)}
    written: dict[str, torch.Tensor] = {}
    for tensor, entry in checkpoint.tensors.items():
        if ".layers." not in tensor or len(entry.shape) != 2 or tensor in router:
            written[tensor] = checkpoint.read(tensor)
            continue
        stored = scheme.quantise(checkpoint.weight(tensor))
        names = scheme.tensors(tensor)
        written |= {names[ending]: part.contiguous() for ending, part in stored.items()}
    ignored = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(checkpoint.path, target, ignore=ignored)
    save_file(written, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = settings
    (target / "config.json").write_text(json.dumps(config))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--heldout", type=Path, default=HELDOUT)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--keep", nargs="*", type=float, default=[0.75, 0.5])
    parser.add_argument("--tokens", type=int, default=8192, help="per domain")
    options = parser.parse_args()
    print("| format | experts kept | way | KL to its original | worst domain | KL to BF16 |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prune_all(options, options.model, "bf16", list(WAYS)[2:], folder)
        for form in options.formats:
            quantise(open_checkpoint(options.model), folder / form, form)
            mean, worst = _kl(options, options.model, folder / form)
            print(f"| {form} | all | | 0 | 0 | {mean:.5f} (worst {worst:.5f}) |", flush=True)
            _prune_all(options, folder / form, form, list(WAYS), folder)


def _prune_all(
    options: argparse.Namespace,
    model: Path,
    form: str,
    ways: list[str],
    folder: Path,
) -> None:
    texts = TextOptions(paths=(options.calibration,), tokens=options.tokens, length=256)
    statistics = folder / f"{form}-statistics"
    calibrate(model, statistics, texts, _CPU, DEFAULT_BATCH, Silent())
    for keep in options.keep:
        for way in ways:
            refit, requantise = WAYS[way]
            output = folder / f"{form}-pruned"
            prune(
                PruneRequest(
                    model=model,
                    output=output,
                    texts=texts,
                    selection=Selection(
                        keep=keep,
                        method="block-obs",
                        block_width=_TILE,
                        refit=refit,
                        requantise=requantise,
                    ),
                    statistics=statistics,
                ),
                Silent(),
            )
            mean, worst = _kl(options, model, output)
            total, _ = _kl(options, options.model, output)
            print(
                f"| {form} | {keep:.0%} | {way} | {mean:.5f} | {worst:.5f} | {total:.5f} |",
                flush=True,
            )
            shutil.rmtree(output)


def _kl(options: argparse.Namespace, original: Path, pruned: Path) -> tuple[float, float]:
    """Mean and worst domain."""
    held = TextOptions(paths=(options.heldout,), tokens=options.tokens, length=256)
    found = compare(original, pruned, held, _CPU, DEFAULT_BATCH, Silent())
    return found.mean.kl_nats, found.domains[found.worst].figures.kl_nats


if __name__ == "__main__":
    main()
