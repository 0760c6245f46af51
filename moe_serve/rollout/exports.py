"""What ``/metrics`` tells of a stack: the exporter, joined to its engines, record and files."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from moe_serve.errors import MoeServeError
from moe_serve.families.kv import kv_bytes_per_token
from moe_serve.files import read_json
from moe_serve.metrics.drift import Drift
from moe_serve.metrics.exporter import READ, Exporter, Recorded, Watched
from moe_serve.metrics.sources import Source
from moe_serve.rollout.feedback import Votes
from moe_serve.rollout.people import ACTOR
from moe_serve.rollout.quality import Quality
from moe_serve.rollout.record import Saved
from moe_serve.rollout.sources import counts_of
from moe_serve.rollout.store import Store
from moe_serve.rollout.traffic import DECISIONS, state_name
from moe_serve.serving.routing import routing_of
from moe_serve.serving.state import StackState
from moe_serve.serving.variants import PRUNED

T = TypeVar("T")
_SLOW, _PAUSE = 1.0, 30.0
"""Seconds after which a failure is slow, and for how long it is not tried again."""


def exporter(state: Path, stack: StackState, votes: Votes) -> Exporter:
    """The collector of a stack's metrics."""
    patience = Patience()
    calibrated = _calibrated(Path(stack.engines[PRUNED].model))
    engines = [
        Watched(
            variant=variant,
            pid=engine.pid,
            weight_bytes=_weight_bytes(Path(engine.model)),
            kv_bytes_per_token=kv_bytes_per_token(read_json(Path(engine.model) / "config.json")),
            source=Source(name=variant, url=f"{engine.url}/metrics", keep=READ),
            # Both route by the original's router, and from the same texts.
            drift=Drift(calibrated) if calibrated else None,
        )
        for variant, engine in stack.engines.items()
    ]
    return Exporter(
        model=stack.served_model,
        engines=engines,
        proxy=counts_of(stack),
        recorded=lambda: _recorded(state, patience),
        votes=votes.totals,
        expert_bytes=_expert_bytes(Path(stack.engines["pruned"].model)),
    )


class Patience:
    """Asks for what may be slow to fail, and not at every scrape.

    An API server that hangs would make each scrape time out, and the control process look dead.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Ask at once."""
        self._clock, self._until = clock, 0.0

    def ask(self, what: Callable[[], T]) -> T | None:
        """What is answered; ``None`` where nothing is, and for a while after a slow failure."""
        began = self._clock()
        if began < self._until:
            return None
        try:
            return what()
        except MoeServeError:
            if self._clock() - began > _SLOW:
                self._until = self._clock() + _PAUSE
            return None


def _recorded(state: Path, patience: Patience) -> Recorded:
    split = patience.ask(lambda: routing_of(state).read())
    share = split.percent / 100.0 if split is not None else None
    try:
        store = Store(state)
        saved, tally = store.saved(), store.tally()
    except MoeServeError:
        return Recorded(share=share)
    return Recorded(
        share=share,
        state=state_name(saved.state, split.percent) if split is not None else None,
        decisions=_decisions(tally),
        guards=_guards(saved),
        quality=_probed(saved),
    )


def _decisions(changes: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    # A person's words may be anything; as a label only whether there were some.
    # Those never taken are there as zero: a rate needs the sample before the first one.
    counted: Counter[tuple[str, str]] = Counter()
    counted.update({(known, "by hand"): 0 for known in DECISIONS})
    counted.update({(known, "by guards"): 0 for known in ("advance", "rollback")})
    for (decision, actor), count in changes.items():
        counted[decision, "by guards" if actor == ACTOR else "by hand"] += count
    return dict(counted)


def _guards(saved: Saved) -> tuple[int, dict[tuple[str, str], float]] | None:
    if not saved.state.active:
        return None
    found = saved.seen.get("decision", {}).get("evidence", [])
    ends = ("lower", "upper", "margin")
    return saved.state.step, {(e["guard"], end): e[end] for e in found for end in ends}


def _probed(saved: Saved) -> Mapping[str, tuple[int, float, float]]:
    found = saved.seen.get("quality")
    return Quality.from_json(found).by_domain() if found is not None else {}


def _weight_bytes(model: Path) -> int:
    """Size of the weight files an engine reads."""
    index = model / "model.safetensors.index.json"
    if index.exists():
        return int(read_json(index)["metadata"]["total_size"])
    return sum(file.stat().st_size for file in model.glob("model*.safetensors"))


def _calibrated(model: Path) -> dict[str, tuple[float, ...]]:
    """Layer → selections of each expert on the calibration texts, of all domains together."""
    path = model / "evidence.json"
    if not path.exists():
        return {}
    return {
        layer: tuple(map(sum, zip(*found["tokens_CN"], strict=True)))
        for layer, found in read_json(path)["layers"].items()
    }


def _expert_bytes(model: Path) -> dict[tuple[str, str], int]:
    """Per layer, from a manifest beside the weights if there is one."""
    path = model / "moe_serve.json"
    if not path.exists():
        return {}
    manifest = read_json(path)
    config = read_json(model / "config.json")
    neurons = {i: c["width"] * c["blocks"] for i, c in manifest["layers"].items()}
    kept = manifest["expert_bytes"]["kept"]
    if not neurons or not config.get("compact_experts"):
        return {}
    per_neuron = kept / sum(neurons.values())
    original = manifest["expert_bytes"]["original"] // len(neurons)
    sizes: dict[tuple[str, str], int] = {}
    for layer, count in neurons.items():
        sizes[layer, "kept"] = round(per_neuron * count)
        sizes[layer, "original"] = original
    return sizes
