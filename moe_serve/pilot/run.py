"""Making and measuring the options; each is kept, so that a stopped pilot goes on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from moe_serve.calibration.governance import undeclared
from moe_serve.calibration.store import RECORD, Statistics
from moe_serve.checkpoint.manifest import MANIFEST
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.errors import UsageError
from moe_serve.evaluation.comparison import Comparison, compare
from moe_serve.files import read_json, write_json
from moe_serve.pilot.decision import Baseline, Option
from moe_serve.pilot.settings import PilotSettings
from moe_serve.progress import Progress
from moe_serve.pruning.corpus import TextOptions, load_corpus, refuse_overlap
from moe_serve.pruning.device import device_named
from moe_serve.pruning.forecasts.sizing import gpus_needed
from moe_serve.pruning.gathering import calibrate
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from moe_serve.version import __version__

RESULTS: Final = "results"
SETTINGS: Final = "settings.json"
STATISTICS: Final = "statistics"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pilot:
    """All that was measured."""

    settings: PilotSettings
    baseline: Baseline
    options: tuple[Option, ...]
    covered: tuple[str, ...]
    """Domains that calibration saw."""
    undeclared: tuple[str, ...] = ()
    """Calibration texts whose owners declared nothing."""


def run(settings: PilotSettings, progress: Progress) -> Pilot:
    """Make and measure every option that is not there yet.

    Raises:
        MoeServeError: an input can't be used, or the folder holds a pilot of other settings.
    """
    original = open_checkpoint(settings.model)
    (settings.output / RESULTS).mkdir(parents=True, exist_ok=True)
    _claim(settings, original)
    seconds, covered = _calibrated(settings, progress)
    record = Statistics(settings.output / STATISTICS).record if covered else {}
    if covered and not settings.allow_overlap:
        _refuse_overlap(settings, original, record)
    options = tuple(
        _option(settings, original, method, keep, seconds, progress)
        for method, keep in _tried(settings)
    )
    hardware = settings.hardware
    total = sum(entry.size for entry in original.tensors.values())
    baseline = Baseline(
        expert_bytes=sum(original.expert_bytes().values()),
        total_bytes=total,
        gpus=gpus_needed(original.config, total, hardware.memory, hardware.kv_tokens),
    )
    return Pilot(
        settings=settings,
        baseline=baseline,
        options=options,
        covered=covered,
        undeclared=tuple(undeclared(record.get("sources", ()))),
    )


def _tried(settings: PilotSettings) -> Iterator[tuple[str, float]]:
    for method in settings.methods:
        for keep in sorted(settings.keep, reverse=True):
            yield method, keep


def _texts(settings: PilotSettings, paths: tuple[Path, ...]) -> TextOptions:
    return TextOptions(
        paths=paths, tokens=settings.tokens, length=settings.sequence_length, seed=settings.seed
    )


def _calibration(settings: PilotSettings) -> TextOptions:
    return replace(
        _texts(settings, settings.calibration),
        declaration=settings.declaration,
        purpose=settings.purpose,
    )


def _refuse_overlap(settings: PilotSettings, original: Checkpoint, record: dict[str, Any]) -> None:
    """Before hours go into options whose figures would be too good."""
    skip = record if settings.skip_overlap else None
    corpus = load_corpus(original, _texts(settings, settings.texts), skip)
    refuse_overlap(corpus.shared(record) if corpus else (), "for calibration")


def _calibrated(settings: PilotSettings, progress: Progress) -> tuple[float, tuple[str, ...]]:
    """Gather statistics once for all options; seconds it took, and domains seen."""
    if not settings.calibration:
        return 0.0, ()
    folder = settings.output / STATISTICS
    seconds = _timed(
        settings.output / RESULTS / "calibration.json",
        folder / RECORD,
        lambda: calibrate(
            settings.model,
            folder,
            _calibration(settings),
            device_named(settings.device),
            settings.batch_tokens,
            progress,
        ),
    )
    return seconds, tuple(Statistics(folder).record["domains"])


def _timed(record: Path, last: Path, make: Callable[[], object]) -> float:
    """Make what is not there yet, and say how many seconds that took.

    Args:
        record: keeps when it began and how long it took; of a run that was stopped, of its last
            part alone.
        last: the file that is there once all is.
        make: what makes it.
    """
    if not last.exists():
        write_json(record, {"began": time.time()})
        make()
    found = read_json(record)
    if "seconds" not in found:
        # Also where this process was stopped between the last file and here.
        found["seconds"] = max(last.stat().st_mtime - found["began"], 0.0)
        write_json(record, found)
    return float(found["seconds"])


def _option(
    settings: PilotSettings,
    original: Checkpoint,
    method: str,
    keep: float,
    calibration_seconds: float,
    progress: Progress,
) -> Option:
    name = f"{method}-{keep:g}"
    record = settings.output / RESULTS / f"{name}.json"
    if not record.exists():
        write_json(record, _made(settings, name, method, keep, progress))
    found = read_json(record)
    quality, hardware = found["comparison"]["quality"], settings.hardware
    worst, memory = quality["worst_domain"], found["comparison"]["memory"]
    intervals = [domain["interval"] for domain in quality["domains"].values()]
    mean = quality["mean"]["interval"]
    # Not the worst domain's alone: another, measured on less text, may reach further.
    highs = [interval["high"]["kl_nats"] for interval in intervals if interval]
    return Option(
        name=name,
        method=method,
        keep=keep,
        folder=str(settings.output / name),
        expert_bytes=memory["expert_bytes"]["pruned"],
        total_bytes=memory["total_bytes"]["pruned"],
        gpus=gpus_needed(
            original.config, memory["total_bytes"]["pruned"], hardware.memory, hardware.kv_tokens
        ),
        mean_kl=quality["mean"]["kl_nats"],
        mean_kl_low=mean["low"]["kl_nats"] if mean else None,
        mean_kl_high=mean["high"]["kl_nats"] if mean else None,
        worst_kl=worst["kl_nats"],
        worst_kl_high=max(highs, default=None),
        worst_domain=worst["domain"],
        perplexity_ratio=quality["mean"]["perplexity_ratio"],
        top1=quality["mean"]["top1_agreement"],
        machine_seconds=calibration_seconds + found["seconds"],
        domains=quality["domains"],
        overlap=tuple(found["comparison"]["overlap"]),
        left_out=found["comparison"]["left_out"],
    )


def _made(
    settings: PilotSettings, name: str, method: str, keep: float, progress: Progress
) -> dict[str, Any]:
    """Prune, unless a run before got that far, and measure."""
    folder = settings.output / name
    device = device_named(settings.device)
    request = PruneRequest(
        model=settings.model,
        output=folder,
        texts=_calibration(settings),
        selection=Selection(
            keep=keep, method=method, uniform=settings.format == "native", seed=settings.seed
        ),
        form=settings.format,
        device=device,
        batch_tokens=settings.batch_tokens,
        statistics=settings.output / STATISTICS if settings.calibration else None,
    )
    seconds = _timed(
        settings.output / RESULTS / f"{name}.pruned.json",
        folder / MANIFEST,
        lambda: prune(request, progress),
    )
    found: Comparison = compare(
        settings.model,
        folder,
        _texts(settings, settings.texts),
        device,
        settings.batch_tokens,
        progress,
        settings.output / "reference",
        allow_overlap=settings.allow_overlap,
        skip_overlap=settings.skip_overlap,
    )
    return {"seconds": seconds, "comparison": found.to_json()}


def _claim(settings: PilotSettings, original: Checkpoint) -> None:
    """Keep a folder to one pilot: whatever lies there was made with the same settings and texts.

    Raises:
        UsageError: it was not.
    """
    record, digest = settings.output / RESULTS / SETTINGS, _digest(settings, original)
    if not record.exists() and not any(record.parent.glob("*.json")):
        write_json(record, {"sha256": digest})
    if not record.exists() or read_json(record).get("sha256") != digest:
        raise UsageError(
            "was made with other settings or texts, of another model or by another version",
            where=str(settings.output),
            remedy="choose another output folder in pilot.toml, or remove this one",
        )


def _digest(settings: PilotSettings, original: Checkpoint) -> str:
    """Of everything that a result depends on; prices and tolerances may change at any time."""
    fixed = settings.model_dump(
        mode="json",
        include={
            "model",
            "calibration",
            "texts",
            "format",
            "tokens",
            "sequence_length",
            "batch_tokens",
            "seed",
            "declaration",
            "purpose",
            "skip_overlap",
        },
    )
    given = [p for p in (*settings.calibration, *settings.texts, settings.declaration) if p]
    files = [file for p in given for file in ([p] if p.is_file() else sorted(p.rglob("*")))]
    fixed |= {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}
    fixed |= {"version": __version__, "fingerprint": original.fingerprint()}
    return hashlib.sha256(repr(sorted(fixed.items())).encode()).hexdigest()


def to_json(pilot: Pilot) -> dict[str, Any]:
    """What was measured, for ``--json``."""
    return {
        "baseline": asdict(pilot.baseline),
        "options": [asdict(option) for option in pilot.options],
        "calibrated_domains": list(pilot.covered),
    }
