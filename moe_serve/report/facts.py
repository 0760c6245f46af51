"""What a report states, read from a checkpoint's own files and computed here once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from moe_serve.checkpoint.manifest import Manifest
from moe_serve.errors import CheckpointError
from moe_serve.files import read_json
from moe_serve.pruning.plan import LayerPlan, Plan
from moe_serve.pruning.records.evidence import Evidence, LayerEvidence

STATES: Final = ("whole", "trimmed", "merged", "constant", "empty", "dropped")
"""What became of an expert: kept, fewer neurons, shares its block, a constant, still selected
without a block, never selected."""
_STANDS_OUT: Final = 1.25
"""A domain names an expert when it selects it so many times as often as domains do on average."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Expert:
    """One original expert."""

    layer: int
    index: int
    state: str
    kept: int
    """Neurons."""
    width: int
    mates: tuple[int, ...]
    """Experts it shares blocks with."""
    cost: float | None
    """Estimated error that what it lost adds; ``None`` where the method does not say."""
    worth: float | None
    """The same if all of it went."""
    tokens: int | None
    """Calibration tokens that selected it; ``None`` without statistics."""
    by_domain: dict[str, int]
    lift: dict[str, float]
    """How many times as often each domain selects it as domains do on average."""
    scores: dict[str, float]

    @property
    def share(self) -> float:
        """Neurons kept over neurons."""
        return self.kept / self.width

    @property
    def starved(self) -> bool:
        """Fewer tokens than neurons: what it does was not seen in full."""
        return self.tokens is not None and self.tokens < self.width

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that stand out, most first, two at most."""
        return standing_out(self.lift)


def standing_out(lift: dict[str, float]) -> tuple[str, ...]:
    """Domains by which experts are named."""
    ranked = sorted(lift, key=lambda name: -lift[name])
    return tuple(name for name in ranked[:2] if lift[name] >= _STANDS_OUT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer of experts."""

    index: int
    experts: tuple[Expert, ...]
    removed_G: tuple[int, ...]
    """Neurons gone at each point of the removal curves; empty where the method has none."""
    error_NG: Floats
    similarity_NN: Floats | None
    measure: str
    """What ``similarity_NN`` is: ``cosine``, ``similarity`` or ``distance``."""
    alternatives: Mapping[str, tuple[float, float | None]]
    """Method → error measured in this layer before compensation and after, ``None`` where it was
    too far behind to be compensated; empty where none were weighed."""
    taken: str | None
    refit: dict[str, Any] | None

    @property
    def share(self) -> float:
        """Neurons stored over the original's; a merged block counts once."""
        return self.stored / sum(e.width for e in self.experts)

    stored: int
    """Neurons stored."""

    def counts(self) -> Counter[str]:
        """Experts by state."""
        return Counter(e.state for e in self.experts)

    @property
    def cost(self) -> float | None:
        """Estimated error added, all experts together."""
        return _sum([e.cost for e in self.experts])

    @property
    def worth(self) -> float | None:
        """Estimated error if every expert went."""
        return _sum([e.worth for e in self.experts])


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Everything that the page shows."""

    manifest: Manifest
    plan: Plan
    evidence: Evidence
    layers: tuple[Layer, ...]
    total_bytes: int
    """Of all weights in the directory."""
    quality: dict[str, Any] | None
    """What ``compare --json`` printed."""
    run: dict[str, Any] | None
    """What ``prune --json`` printed."""

    @property
    def experts(self) -> tuple[Expert, ...]:
        """All of them."""
        return tuple(e for layer in self.layers for e in layer.experts)

    @property
    def saved_bytes(self) -> int:
        """What the experts no longer take; none in a full-size form."""
        size = self.manifest.expert_bytes
        return 0 if self.manifest.format == "tied" else size.original - size.kept

    @property
    def thin_domains(self) -> dict[str, int]:
        """Domains with less than a quarter of an even share of the tokens."""
        tokens = (self.manifest.calibration or {}).get("tokens", {})
        even = sum(tokens.values()) / max(len(tokens), 1)
        return {name: count for name, count in tokens.items() if count < even / 4}

    @property
    def starved(self) -> tuple[Expert, ...]:
        """Experts that too few tokens reached, fewest first."""
        found = [e for e in self.experts if e.starved]
        return tuple(sorted(found, key=lambda e: (e.tokens, e.layer, e.index)))

    @classmethod
    def read(
        cls, folder: Path, *, evidence: Evidence, quality: Path | None, run: Path | None
    ) -> Facts:
        """Read a pruned checkpoint's files; its weights stay closed.

        Raises:
            MoeServeError: one is missing, damaged, or of another run.
        """
        manifest = Manifest.load(folder)
        plan = Plan.load(folder / "plan.json")
        if plan.sha256() != manifest.plan_sha256:
            raise CheckpointError(
                "is not the plan that this checkpoint was made by",
                where=str(folder / "plan.json"),
                remedy="restore it or prune again",
            )
        weighed = plan.settings.get("weighed")
        by_layer = weighed.get("layers", {}) if isinstance(weighed, dict) else {}
        layers = tuple(
            _layer(
                index,
                plan.layers.get(index),
                evidence,
                by_layer.get(str(index), {}),
                (manifest.refit or {}).get(str(index)),
            )
            for index in evidence.moe_layers
        )
        index = read_json(folder / "model.safetensors.index.json")
        return cls(
            manifest=manifest,
            plan=plan,
            evidence=evidence,
            layers=layers,
            total_bytes=int(index["metadata"]["total_size"]),
            quality=_printed(quality, "quality", "compare") if quality else None,
            run=_printed(run, "seconds", "prune") if run else None,
        )


def _printed(path: Path, key: str, command: str) -> dict[str, Any]:
    found = read_json(path)
    if key not in found:
        raise CheckpointError(
            f"is not what moe-serve {command} --json prints",
            where=str(path),
            remedy=f"write it with moe-serve {command} … --json > FILE",
        )
    return found


def _layer(
    index: int,
    plan: LayerPlan | None,
    evidence: Evidence,
    weighed: dict[str, Any],
    refit: dict[str, Any] | None,
) -> Layer:
    seen = evidence.layers.get(index)
    why = plan.why if plan else {}
    removal = why.get("removal", {"removed": [], "error": []})
    similarity, measure = _similarity(why, seen)
    experts = tuple(_expert(index, e, plan, evidence, seen) for e in range(evidence.experts))
    return Layer(
        index=index,
        experts=experts,
        stored=plan.neurons_kept() if plan else evidence.experts * evidence.width,
        removed_G=tuple(removal["removed"]),
        error_NG=np.array(removal["error"], dtype=np.float64),
        similarity_NN=similarity,
        measure=measure,
        alternatives={
            name: (bare, weighed["error"].get(name))
            for name, bare in weighed.get("uncompensated", {}).items()
        },
        taken=weighed.get("taken"),
        refit=refit if isinstance(refit, dict) and "error_before" in refit else None,
    )


def _similarity(why: dict[str, Any], seen: LayerEvidence | None) -> tuple[Floats | None, str]:
    """What the groups rest on, else how alike mean outputs are."""
    for name in ("similarity", "distance"):
        if name in why:
            return np.array(why[name], dtype=np.float64), name
    if seen is None:
        return None, "cosine"
    return np.array(seen.cosine_NN, dtype=np.float64) / 100, "cosine"


def _expert(
    layer: int, index: int, plan: LayerPlan | None, evidence: Evidence, seen: LayerEvidence | None
) -> Expert:
    state, kept, mates = _fate(plan, index, evidence.width)
    why = plan.why if plan else {}
    by_domain: dict[str, int] = {}
    lift: dict[str, float] = {}
    if seen is not None:
        names = evidence.domains
        by_domain = {name: seen.tokens_CN[c][index] for c, name in enumerate(names)}
        rates = {n: count / max(evidence.tokens[n], 1) for n, count in by_domain.items()}
        mean = sum(rates.values()) / len(rates)
        lift = {name: rate / mean if mean else 0.0 for name, rate in rates.items()}
    return Expert(
        layer=layer,
        index=index,
        state=state,
        kept=kept,
        width=evidence.width,
        mates=mates,
        cost=_entry(why.get("error_added"), index),
        worth=_entry(why.get("error_if_dropped"), index),
        tokens=sum(by_domain.values()) if seen is not None else None,
        by_domain=by_domain,
        lift=lift,
        scores={
            name: float(values[index])
            for name, values in (why.get("scores") or {}).items()
            if isinstance(values, list) and len(values) == evidence.experts
        },
    )


def _fate(plan: LayerPlan | None, index: int, width: int) -> tuple[str, int, tuple[int, ...]]:
    """(state, neurons, whom it shares blocks with)."""
    if plan is None:
        return "whole", width, ()
    own = plan.experts[index]
    if own is None:
        return "dropped", 0, ()
    if not own:
        return ("constant" if plan.constants else "empty"), 0, ()
    kept = plan.width * len(own)
    mates = {e for e, blocks in enumerate(plan.experts) if set(blocks or ()) & set(own)}
    mates |= {part.expert for b in own for part in plan.blocks[b].parts}
    if len(mates) > 1:
        return "merged", kept, tuple(sorted(mates - {index}))
    return ("whole" if kept >= width else "trimmed"), kept, ()


def _entry(values: list[float] | None, index: int) -> float | None:
    return float(values[index]) if values is not None else None


def _sum(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None
