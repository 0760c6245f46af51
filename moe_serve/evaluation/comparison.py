"""``compare``: quality per domain and memory, as one result."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_serve.checkpoint.manifest import MANIFEST, Manifest
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.errors import UsageError
from moe_serve.evaluation.divergence import divergence
from moe_serve.evaluation.generation import SideBySide, generation_json
from moe_serve.evaluation.models import is_url
from moe_serve.evaluation.quality import DomainQuality, Estimates, Figures, by_domain
from moe_serve.progress import SILENT, Progress
from moe_serve.pruning.corpus import TextOptions, load_corpus, refuse_overlap
from moe_serve.pruning.device import CPU
from moe_serve.pruning.request import DEFAULT_BATCH


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What ``compare --json`` prints."""

    original: Path | str
    """A directory, or an engine's URL."""
    pruned: Path | str
    """The same."""
    domains: dict[str, DomainQuality]
    """Each domain's figures with their intervals."""
    expert_bytes: dict[str, int]
    """Variant → bytes of the routed experts."""
    total_bytes: dict[str, int]
    """Variant → bytes of all weights."""
    speed: dict[str, Any] = field(default_factory=dict)
    """Of two results of ``vllm bench serve``, where there are any."""
    overlap: tuple[str, ...] = ()
    """Text files that the pruned checkpoint was calibrated on, wholly or in some documents."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """File → documents that were not measured on because it was calibrated on them."""
    top: int | None = None
    """Where KL is a lower bound: the log-probabilities per token that it is from."""
    generation: tuple[SideBySide, ...] = ()
    """Answers to prompts, where there were any."""
    held: dict[str, Any] = field(default_factory=dict)
    """What each holds in memory and how long loading took, where that was measured."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """What lm-eval's tasks came to, where there were any."""

    @property
    def mean(self) -> Figures:
        """Mean over domains, each weighing the same; perplexity ratios by geometric mean."""
        every = [d.figures for d in self.domains.values()]
        return Figures(
            kl_nats=float(np.mean([f.kl_nats for f in every])),
            perplexity_ratio=float(np.exp(np.mean([np.log(f.perplexity_ratio) for f in every]))),
            top1_agreement=float(np.mean([f.top1_agreement for f in every])),
        )

    @property
    def mean_interval(self) -> tuple[Figures, Figures] | None:
        """Of 95 % of that mean; ``None`` where a domain has none."""
        known = [d.estimates for d in self.domains.values() if d.estimates is not None]
        return Estimates.average(known).interval if len(known) == len(self.domains) else None

    @property
    def worst(self) -> str:
        """The domain with the largest KL."""
        return self.ordered[0]

    @property
    def ordered(self) -> list[str]:
        """Domains, the one that loses most first; equal ones by name."""
        return sorted(self.domains, key=lambda name: (-self.domains[name].figures.kl_nats, name))

    def to_json(self) -> dict[str, Any]:
        """The contract's shape."""
        worst = self.domains[self.worst].figures
        more = {"generation": generation_json(self.generation)} if self.generation else {}
        more |= {"held": self.held} if self.held else {}
        more |= {"tasks": self.tasks} if self.tasks else {}
        return {
            "original": str(self.original),
            "pruned": str(self.pruned),
            "quality": {
                "kl": {"exact": self.top is None, "top": self.top},
                "mean": asdict(self.mean) | {"interval": _interval(self.mean_interval)},
                "worst_domain": asdict(worst) | {"domain": self.worst},
                "domains": {
                    name: asdict(quality.figures)
                    | {
                        "tokens": quality.tokens,
                        "documents": quality.documents,
                        "interval": _interval(quality.interval),
                    }
                    for name, quality in self.domains.items()
                },
            },
            "memory": self._memory(),
            "speed": self.speed,
            "overlap": list(self.overlap),
            "left_out": dict(self.left_out),
        } | more

    def _memory(self) -> dict[str, dict[str, int]]:
        """Nothing of engines: what they hold is more than weights, and theirs to say."""
        sizes = {"expert_bytes": self.expert_bytes, "total_bytes": self.total_bytes}
        return {name: found for name, found in sizes.items() if found}


def compare(
    original: Path,
    pruned: Path,
    texts: TextOptions,
    device: torch.device = CPU,
    batch_tokens: int = DEFAULT_BATCH,
    progress: Progress = SILENT,
    reference: Path | None = None,
    *,
    allow_overlap: bool = False,
    skip_overlap: bool = False,
) -> Comparison:
    """Measure a pruned checkpoint against its original on texts.

    ``reference`` keeps what the original put out, for further calls on the same texts. With
    ``skip_overlap`` documents that were calibrated on are left out.

    Raises:
        UsageError: no texts, or texts that were calibrated on, unless ``allow_overlap``; with
            ``skip_overlap`` only where they are a whole file, or nothing is left.
        MoeServeError: a checkpoint or the texts can't be used.
    """
    before, after = open_checkpoint(original), open_checkpoint(pruned)
    calibration = calibration_of(str(pruned))
    corpus = load_corpus(before, texts, calibration if skip_overlap else None)
    if corpus is None:
        raise UsageError(
            "give texts to compare on",
            where="--texts",
            remedy="texts that calibration did not use: .jsonl, .txt or a folder of them",
        )
    shared = corpus.shared(calibration)
    if not allow_overlap:
        refuse_overlap(shared, f"to calibrate {pruned}")
    with tempfile.TemporaryDirectory(prefix="moe-serve-compare-") as work:
        values = divergence(
            before, after, corpus.sequences, Path(work), device, batch_tokens, progress, reference
        )
    return Comparison(
        original=original,
        pruned=pruned,
        domains=by_domain(corpus.sequences, values),
        expert_bytes={
            "original": sum(before.expert_bytes().values()),
            "pruned": sum(after.expert_bytes().values()),
        },
        total_bytes={"original": _total(before), "pruned": _total(after)},
        overlap=shared,
        left_out=corpus.left_out,
    )


def _interval(ends: tuple[Figures, Figures] | None) -> dict[str, Any] | None:
    return {"low": asdict(ends[0]), "high": asdict(ends[1])} if ends else None


def _total(checkpoint: Checkpoint) -> int:
    return sum(entry.size for entry in checkpoint.tensors.values())


def calibration_of(name: str) -> dict[str, Any]:
    """What a pruned directory says of its calibration; nothing of an engine."""
    if is_url(name) or not (Path(name) / MANIFEST).exists():
        return {}
    return Manifest.load(Path(name)).calibration or {}
