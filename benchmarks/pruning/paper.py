"""What pruning large published models would take: ``python -m benchmarks.pruning.paper``.

The dry run's formulas (``forecasts/steps.py``) on the sizes in ``paper.json``, which are
those of the published ``config.json`` files; weights are counted in transformers' own modules. No
weight is read and nothing is measured: rates are assumptions, printed with the result.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moe_serve.calibration.gradients import tokens_felt
from moe_serve.families import family_of
from moe_serve.pruning.forecasts.forecast import Forecast, Rates
from moe_serve.pruning.forecasts.steps import apply_step, calibrate_step, plan_step
from moe_serve.pruning.forecasts.work import Sizes, Work
from moe_serve.pruning.plan import Refit

MODELS: Final = Path(__file__).with_name("paper.json")
BASE_MEMORY: Final = 600_000_000
"""Interpreter and libraries."""
MACHINES: Final = {
    "16 cores": Rates(flops=1e12, processor_flops=1e12, read=3e9, write=1.5e9),
    "one H100 and 16 cores": Rates(flops=4e13, processor_flops=1e12, read=3e9, write=1.5e9),
}
"""FP32 without tensor cores; one NVMe disk."""


def main() -> None:
    """Print a table per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--domains", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8192, help="per domain")
    parser.add_argument("--keep", type=float, default=0.5)
    options = parser.parse_args()
    work = Work(
        tokens=options.domains * options.tokens,
        domains=options.domains,
        length=2048,
        batch_tokens=4096,
        keep=options.keep,
        inverts=True,
        refit=Refit(),
    )
    for machine, rates in MACHINES.items():
        print(f"{machine}: {rates}")
    for name, model in json.loads(MODELS.read_text()).items():
        sizes = sizes_of(model["config"], model["weight_bytes"])
        report(name, sizes, replace(work, reverse=tokens_felt("metric", sizes.shape.hidden)))


def report(name: str, sizes: Sizes, work: Work) -> None:
    """Print one model's steps."""
    steps = (calibrate_step(sizes, work), plan_step(sizes, work), apply_step(sizes, work))
    found = Forecast(steps=steps, output_bytes=steps[-1].written, base_memory=BASE_MEMORY)
    print(
        f"\n### {name}: {sizes.total_bytes / 1e9:,.0f} GB, largest layer "
        f"{sizes.layer_bytes / 1e9:,.1f} GB; peak memory {found.memory / 1e9:,.0f} GB, disk "
        f"{found.disk / 1e9:,.0f} GB, of which {found.output_bytes / 1e9:,.0f} GB stay\n"
    )
    columns = " | ".join(f"minutes, {machine}" for machine in MACHINES)
    print(f"| step | passes | PFLOP | read GB | written GB | memory GB | {columns} |")
    print("|---" * (6 + len(MACHINES)) + "|")
    for step in steps:
        minutes = " | ".join(f"{step.seconds(r) / 60:,.0f}" for r in MACHINES.values())
        flops = step.flops + step.processor_flops
        print(
            f"| {step.name} | {step.passes} | {flops / 1e15:,.1f} | {step.read / 1e9:,.0f} | "
            f"{step.written / 1e9:,.0f} | {step.memory / 1e9:,.0f} | {minutes} |"
        )
    minutes = " | ".join(f"{found.seconds(r) / 60:,.0f}" for r in MACHINES.values())
    print(f"| all | {found.passes} | | | | | {minutes} |", flush=True)


def sizes_of(config: dict[str, Any], weight_bytes: int) -> Sizes:
    """Count weights in an empty model; layers for multi-token prediction are left out.

    Args:
        config: of a published model.
        weight_bytes: per weight of the decoder; embedding and output matrix take two.
    """
    skeleton = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(skeleton, trust_remote_code=False)
    family = family_of(config)
    shape = family.shape(config)
    layers = [0] * shape.layers
    for name, weight in model.named_parameters():
        if name.startswith("model.layers."):
            layers[int(name.split(".")[2])] += weight.numel()
    sparse, lowest = len(family.moe_layers(config)), min(family.moe_layers(config))
    routed = sparse * 3 * shape.experts * shape.width * shape.hidden
    table = 2 * shape.vocabulary * shape.hidden
    decoder = weight_bytes * sum(layers)
    return Sizes(
        shape=shape,
        sparse=sparse,
        total_bytes=decoder + 2 * table,
        decoder_bytes=decoder,
        expert_bytes=weight_bytes * routed,
        embedding_bytes=table,
        head_bytes=table,
        layer_bytes=weight_bytes * max(layers),
        layer_weights=max(layers),
        dense_weights=sum(layers) - routed,
        lowest=lowest,
        lower_bytes=weight_bytes * sum(layers[:lowest]),
    )


if __name__ == "__main__":
    main()
