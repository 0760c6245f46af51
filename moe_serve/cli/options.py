"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


def words(*known: str) -> Callable[[str], list[str]]:
    """What a shell offers for an option's value."""
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


def _methods(incomplete: str) -> list[str]:
    from moe_serve.pruning.methods.registry import AUTO, METHODS

    return words(AUTO, *sorted(METHODS))(incomplete)


Model = Annotated[Path, typer.Argument(help="Directory of the original checkpoint.")]
Output = Annotated[Path, typer.Argument(help="Directory to make; resumed if unfinished.")]
Calibration = Annotated[
    list[Path] | None,
    typer.Option(
        "--calibration",
        help="Texts to observe the model on: .jsonl, .txt, or a folder of them. Repeatable. "
        "Without any, the choice is made from the weights alone.",
    ),
]
ObjectiveName = Annotated[
    str,
    typer.Option(
        "--objective",
        help="mean weighs all domains alike; worst-domain finds weights under which the one that "
        "loses most loses less, in four trial runs on part of the texts.",
        autocompletion=words("mean", "worst-domain"),
    ),
]
TaskTexts = Annotated[
    list[Path] | None,
    typer.Option(
        "--task-texts",
        help="Texts of one task to prune for; they form domains of their own. Repeatable.",
    ),
]
TaskWeight = Annotated[
    float | None,
    typer.Option(
        "--task-weight",
        help="The task's part of all weight: 0 prunes for no task in particular, 1 for the task "
        "alone; by default 0.5.",
    ),
]
DeclarationFile = Annotated[
    Path | None,
    typer.Option(
        "--declaration",
        help="calibration.toml: owner, licence and terms of each source of texts; a run that they "
        "forbid is refused.",
    ),
]
Purpose = Annotated[
    str | None,
    typer.Option("--purpose", help="What the run is for, as the declared purposes name it."),
]
Tokens = Annotated[int, typer.Option("--tokens", help="At most this many tokens from each domain.")]
Length = Annotated[int, typer.Option("--sequence-length", help="Tokens per sequence.")]
BatchTokens = Annotated[
    int, typer.Option("--batch-tokens", min=1, help="Tokens in memory at once.")
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu or cuda; by default the GPU if there is one.",
        autocompletion=words("cpu", "cuda"),
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Equal seeds give equal bytes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Keep = Annotated[
    float | None,
    typer.Option("--keep", help="Share of the routed experts' bytes to keep, e.g. 0.5."),
]
Experts = Annotated[
    int | None,
    typer.Option("--experts", help="Instead: keep what this many experts per layer take."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Instead: keep as much as fits a GPU of this size beside the cache, e.g. 24GiB.",
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option("--gpu", help='Instead: the same by name, e.g. "RTX 4090", L40S, "A100 80GB".'),
]
GpuCount = Annotated[
    int,
    typer.Option("--gpu-count", help="With --memory or --gpu: GPUs that share the model."),
]
KvTokens = Annotated[
    int,
    typer.Option(
        "--kv-tokens", min=0, help="With --memory or --gpu: tokens whose keys and values must fit."
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        help="How to choose; auto is the best we have; a wrong name lists all.",
        autocompletion=_methods,
    ),
]
BlockWidth = Annotated[
    int | None,
    typer.Option(
        "--block-width",
        help="Neurons per stored block; by default the fewest that can be served, an eighth of an "
        "expert at least.",
    ),
]
RefitFlag = Annotated[
    bool | None,
    typer.Option(
        "--refit/--no-refit", help="Re-fit what is kept so that it makes up for the rest."
    ),
]
Requantise = Annotated[
    bool,
    typer.Option(
        "--requantise/--keep-tiles",
        help="Quantised models: choose neurons freely and round them once more, or keep whole "
        "tiles byte for byte.",
    ),
]
RouterRefitFlag = Annotated[
    bool,
    typer.Option(
        "--router-refit/--no-router-refit",
        help="Re-fit the router to what is kept, where held-out tokens say that it helps.",
    ),
]
HealFlag = Annotated[
    bool,
    typer.Option(
        "--heal/--no-heal",
        help="Train what is kept towards the original, layer by layer, while held-out tokens gain.",
    ),
]
HealRounds = Annotated[
    int,
    typer.Option(
        min=0,
        max=16,
        help="With --heal: how often the original writes the texts anew, three drafts of each, to "
        "train on as well. 0: the texts alone, which gains half as much in a tenth of the time.",
    ),
]
FormatName = Annotated[
    str,
    typer.Option(
        "--format",
        help="compact, tied, native or substitution.",
        autocompletion=words("compact", "native", "substitution", "tied"),
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Say what the run would read, take and write on this machine; stop there."
    ),
]
AcrossLayers = Annotated[
    bool,
    typer.Option(
        "--across-layers/--each-layer",
        help="Spend the budget where the loss needs it, or give every layer the same share.",
    ),
]
CoefficientsName = Annotated[
    str | None,
    typer.Option(
        "--coefficients",
        help="How merged experts are weighted: uniform, frequency, saliency or qp (least squares). "
        "By default as the method was published.",
        autocompletion=words("frequency", "qp", "saliency", "uniform"),
    ),
]
DropWhenBetter = Annotated[
    bool | None,
    typer.Option(
        "--drop-when-better/--always-merge",
        help="Merge a group only where that beats dropping on held-out tokens. "
        "By default as the method does.",
    ),
]
