"""``prune``, and the same run in its steps ``plan`` and ``apply``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.cli import options
from moe_serve.cli.forecast import show_forecast
from moe_serve.cli.output import out, print_json
from moe_serve.cli.progress import progress_bar
from moe_serve.pruning.corpus import DEFAULT_LENGTH, DEFAULT_TOKENS, TextOptions
from moe_serve.pruning.device import device_named
from moe_serve.pruning.forecasts.dryrun import dry_run
from moe_serve.pruning.forecasts.gpus import wanted_memory
from moe_serve.pruning.forecasts.sizing import DEFAULT_KV_TOKENS
from moe_serve.pruning.methods.registry import AUTO
from moe_serve.pruning.plan import HEAL_ROUNDS
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.request import DEFAULT_BATCH, PruneRequest
from moe_serve.pruning.run import PruneResult, prune
from moe_serve.pruning.selection import MEAN, Selection


def prune_command(
    model: options.Model,
    output: options.Output,
    keep: options.Keep = None,
    experts: options.Experts = None,
    memory: options.Memory = None,
    gpu: options.Gpu = None,
    gpu_count: options.GpuCount = 1,
    kv_tokens: options.KvTokens = DEFAULT_KV_TOKENS,
    calibration: options.Calibration = None,
    task_texts: options.TaskTexts = None,
    task_weight: options.TaskWeight = None,
    method: options.MethodName = AUTO,
    block_width: options.BlockWidth = None,
    refit: options.RefitFlag = None,
    router_refit: options.RouterRefitFlag = False,
    heal: options.HealFlag = False,
    heal_rounds: options.HealRounds = HEAL_ROUNDS,
    objective: options.ObjectiveName = MEAN,
    across_layers: options.AcrossLayers = True,
    coefficients: options.CoefficientsName = None,
    drop_when_better: options.DropWhenBetter = None,
    requantise: options.Requantise = False,
    form: options.FormatName = "compact",
    plan: Annotated[Path | None, typer.Option(help="Carry out this plan.")] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="Use these statistics, or keep the run's in this folder.")
    ] = None,
    declaration: options.DeclarationFile = None,
    purpose: options.Purpose = None,
    tokens: options.Tokens = DEFAULT_TOKENS,
    length: options.Length = DEFAULT_LENGTH,
    batch_tokens: options.BatchTokens = DEFAULT_BATCH,
    seed: options.Seed = 0,
    device: options.Device = None,
    show: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Prune a model offline: calibrate, plan, apply. Interrupted, it resumes."""
    request = PruneRequest(
        model=model,
        output=output,
        texts=TextOptions(
            paths=tuple(calibration or ()),
            task_paths=tuple(task_texts or ()),
            task_weight=task_weight,
            tokens=tokens,
            length=length,
            seed=seed,
            declaration=declaration,
            purpose=purpose,
        ),
        selection=Selection(
            keep=keep,
            experts=experts,
            memory=wanted_memory(memory, gpu),
            gpu_count=gpu_count,
            kv_tokens=kv_tokens,
            method=method,
            block_width=block_width,
            refit=refit,
            router_refit=router_refit,
            heal=heal,
            heal_rounds=heal_rounds,
            uniform=form == "native",
            constants=form == "substitution",
            across_layers=across_layers,
            coefficients=coefficients,
            drop_when_better=drop_when_better,
            requantise=requantise,
            objective=objective,
            seed=seed,
        ),
        form=form,
        device=device_named(device),
        batch_tokens=batch_tokens,
        plan=plan,
        statistics=statistics,
    )
    if show:
        show_forecast(dry_run(request), as_json=as_json)
        return
    with progress_bar() as progress:
        result = prune(request, progress)
    _report(result, request.model, as_json=as_json)


def _report(result: PruneResult, model: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(result.to_json())
        return
    size = result.manifest.expert_bytes
    share = size.kept / size.original
    out.print(f"{result.output}: {size.kept:,} of {size.original:,} expert bytes ({share:.1%})")
    if numbers := result.manifest.numbers:
        kept, rounded = (
            ", ".join(f"{name} {count}" for name, count in numbers[key].items())
            for key in ("kept", "requantised")
        )
        out.print(f"blocks kept byte for byte: {kept}; rounded again: {rounded}")
    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    out.print(f"method {result.manifest.method}; {phases}")
    out.print(
        f"next: moe-serve compare {model} {result.output} --texts heldout.jsonl", soft_wrap=True
    )


def plan_command(
    statistics: Annotated[Path, typer.Argument(help="Folder made by calibrate.")],
    output: Annotated[Path, typer.Argument(help="plan.json to write.")],
    keep: options.Keep = None,
    experts: options.Experts = None,
    memory: options.Memory = None,
    gpu: options.Gpu = None,
    gpu_count: options.GpuCount = 1,
    kv_tokens: options.KvTokens = DEFAULT_KV_TOKENS,
    method: options.MethodName = AUTO,
    block_width: options.BlockWidth = None,
    refit: options.RefitFlag = None,
    router_refit: options.RouterRefitFlag = False,
    heal: options.HealFlag = False,
    heal_rounds: options.HealRounds = HEAL_ROUNDS,
    across_layers: options.AcrossLayers = True,
    coefficients: options.CoefficientsName = None,
    drop_when_better: options.DropWhenBetter = None,
    requantise: options.Requantise = False,
    form: options.FormatName = "compact",
    model: Annotated[
        Path | None, typer.Option(help="The checkpoint, where it has moved since calibrate.")
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Decide what to keep, from statistics; writes plan.json."""
    found = Statistics(statistics)
    checkpoint = open_checkpoint(model or Path(found.record["model"]))
    selection = Selection(
        keep=keep,
        experts=experts,
        memory=wanted_memory(memory, gpu),
        gpu_count=gpu_count,
        kv_tokens=kv_tokens,
        method=method,
        block_width=block_width,
        refit=refit,
        router_refit=router_refit,
        heal=heal,
        heal_rounds=heal_rounds,
        uniform=form == "native",
        constants=form == "substitution",
        across_layers=across_layers,
        coefficients=coefficients,
        drop_when_better=drop_when_better,
        requantise=requantise,
        seed=seed,
    )
    with progress_bar() as progress:
        made = make_plan(
            checkpoint, found, selection, progress, form=form, device=device_named(device)
        )
    made.save(output)
    if as_json:
        print_json({"output": str(output), "method": made.method, "sha256": made.sha256()})
    else:
        out.print(f"{output}: {made.method} on {len(made.layers)} layers")


def apply_command(
    model: options.Model,
    plan: Annotated[Path, typer.Argument(help="plan.json")],
    output: options.Output,
    calibration: options.Calibration = None,
    task_texts: options.TaskTexts = None,
    form: options.FormatName = "compact",
    declaration: options.DeclarationFile = None,
    purpose: options.Purpose = None,
    tokens: options.Tokens = DEFAULT_TOKENS,
    length: options.Length = DEFAULT_LENGTH,
    batch_tokens: options.BatchTokens = DEFAULT_BATCH,
    seed: options.Seed = 0,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Carry out a plan. With texts, what is kept is re-fitted where the plan says so."""
    request = PruneRequest(
        model=model,
        output=output,
        texts=TextOptions(
            paths=tuple(calibration or ()),
            task_paths=tuple(task_texts or ()),
            tokens=tokens,
            length=length,
            seed=seed,
            declaration=declaration,
            purpose=purpose,
        ),
        selection=Selection(seed=seed),
        form=form,
        device=device_named(device),
        batch_tokens=batch_tokens,
        plan=plan,
    )
    with progress_bar() as progress:
        result = prune(request, progress)
    _report(result, request.model, as_json=as_json)
