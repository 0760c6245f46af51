"""The demo's steps; each says what it does and how long it took."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from moe_serve.checkpoint.staging import require_space
from moe_serve.demo.clients import Load, Timing, ask_everything, time_requests
from moe_serve.errors import ServingError, UsageError
from moe_serve.evaluation.comparison import Comparison, compare
from moe_serve.metrics.sources import Source, total
from moe_serve.progress import Progress
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import DEFAULT_BATCH, PruneRequest
from moe_serve.pruning.run import PruneResult, prune
from moe_serve.pruning.selection import Selection
from moe_serve.rollout.traffic import Decision, move
from moe_serve.serving.ports import free_port
from moe_serve.serving.variants import ORIGINAL, PRUNED, VARIANTS

_START_SECONDS: Final = 300
_SPACE: Final = 500_000_000
_HOLD_SECONDS: Final = 4.0

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRequest:
    """What the demo runs on."""

    model: Path
    calibration: Path
    heldout: Path
    output: Path
    keep: float = 0.5
    tokens: int = 4096
    """Per domain, for calibration and for comparison each."""
    length: int = 256

    def check(self) -> None:
        """Refuse what can't work before anything long begins.

        Raises:
            UsageError: a path is missing or the output is not empty.
        """
        for path in (self.model, self.calibration, self.heldout):
            if not path.exists():
                raise UsageError(
                    "does not exist",
                    where=str(path),
                    remedy="run the demo from a checkout, or give --model, --calibration "
                    "and --heldout",
                )
        if self.output.exists() and any(self.output.iterdir()):
            raise UsageError("is not empty", where=str(self.output), remedy="give another --output")
        require_space(self.output, _SPACE)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """Everything the demo measured."""

    pruned: PruneResult
    comparison: Comparison
    timing: dict[str, Timing]
    memory: dict[str, dict[str, float]]
    """Variant → kind → bytes, from our metrics."""
    requests: dict[str, dict[str, int]]
    """Phase → who answered → requests."""
    failed: int
    rollback_seconds: float | None
    state: Path
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """One object."""
        return {
            "prune": self.pruned.to_json(),
            "compare": self.comparison.to_json(),
            "timing": {name: asdict(t) for name, t in self.timing.items()},
            "memory": self.memory,
            "requests": self.requests,
            "failed": self.failed,
            "rollback_effective_seconds": self.rollback_seconds,
            "state": str(self.state),
            "seconds": round(self.seconds, 1),
        }


def run_demo(request: DemoRequest, tell: Tell, progress: Progress) -> DemoResult:
    """Prune, verify, compare, serve, measure, roll out and roll back.

    Raises:
        MoeServeError: a step failed; whatever was started is stopped.
    """
    request.check()
    began = time.monotonic()
    request.output.mkdir(parents=True, exist_ok=True)
    pruned = request.output / "pruned"
    tell(f"1/6 prune {request.model.name} to {request.keep:.0%} of its expert bytes")
    result = prune(_prune_request(request, pruned), progress)
    tell("2/6 verify every byte against plan and original")
    found = verify(pruned, request.model, progress)
    if not found.passed:
        raise ServingError(
            "; ".join(found.problems),
            where=str(pruned),
            remedy="remove the folder and run the demo again",
        )
    tell("3/6 compare on texts that calibration never saw")
    comparison = compare(
        request.model,
        pruned,
        TextOptions(paths=(request.heldout,), tokens=request.tokens, length=request.length),
        torch.device("cpu"),
        DEFAULT_BATCH,
        progress,
    )
    tell("4/6 start both models in vLLM behind Envoy (about a minute)")
    state = request.output / "state"
    with _stack(request, pruned, state, tell) as up:
        endpoint, model = up["endpoint"], request.model.resolve().name
        tell("5/6 ask both with the openai client: completions, chat, streams")
        for variant in VARIANTS:
            ask_everything(endpoint, model, variant)
        timing = {v: time_requests(endpoint, model, v, requests=5, tokens=48) for v in VARIANTS}
        memory = _memory(up["metrics"])
        tell("6/6 move traffic under load: 0 → 50 → 100 → rollback")
        load, seconds = _roll(endpoint, model, state, tell)
    return DemoResult(
        pruned=result,
        comparison=comparison,
        timing=timing,
        memory=memory,
        requests=_phases(load),
        failed=load.failed,
        rollback_seconds=seconds,
        state=state,
        seconds=time.monotonic() - began,
    )


def _prune_request(request: DemoRequest, output: Path) -> PruneRequest:
    return PruneRequest(
        model=request.model,
        output=output,
        texts=TextOptions(
            paths=(request.calibration,), tokens=request.tokens, length=request.length
        ),
        selection=Selection(keep=request.keep),
    )


@contextmanager
def _stack(request: DemoRequest, pruned: Path, state: Path, tell: Tell) -> Iterator[dict[str, Any]]:
    """``moe-serve up`` as a user runs it, stopped with SIGTERM at the end."""
    command = [
        *(sys.executable, "-m", "moe_serve", "up", "--json"),
        *("--original", str(request.model), "--pruned", str(pruned), "--state", str(state)),
        *("--port", str(free_port()), "--control-port", str(free_port())),
    ]
    log = request.output / "up.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                process.wait(_START_SECONDS)
                raise ServingError(
                    f"the stack did not start:\n{log.read_text()[-2000:]}",
                    where="moe-serve up",
                    remedy=f"the whole log is {log}",
                )
            for text in log.read_text().splitlines():
                tell(f"    {text}")
            yield json.loads(line)
        finally:
            process.terminate()
            process.wait(60)


def _memory(metrics: str) -> dict[str, dict[str, float]]:
    """What our own metrics say of the engines' memory."""
    samples = Source(name="control", url=metrics).read(timeout=10.0) or []
    figures: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        kinds = ("weights", "rss", "kv_cache")
        values = {
            kind: total(samples, "moe_serve_engine_memory_bytes", variant=variant, kind=kind)
            for kind in kinds
        }
        figures[variant] = {kind: v for kind, v in values.items() if v is not None}
    return figures


def _roll(endpoint: str, model: str, state: Path, tell: Tell) -> tuple[Load, float | None]:
    seconds = None
    with Load(endpoint=endpoint, model=model) as load:
        for phase, percent in (("0 %", 0.0), ("50 %", 50.0), ("100 %", 100.0), ("rollback", 0.0)):
            decision: Decision = "rollback" if phase == "rollback" else "set"
            moved = move(state, percent, decision=decision, reason="demo", actor="demo")
            load.phase = phase
            time.sleep(_HOLD_SECONDS)
            if decision == "rollback":
                seconds = moved.effective_seconds
            tell(f"    {phase}: {load.total} requests so far, {load.failed} failed")
    return load, seconds


def _phases(load: Load) -> dict[str, dict[str, int]]:
    """Requests by the phase in which they began; the switch itself may fall into one."""
    phases: dict[str, dict[str, int]] = {}
    for (phase, who), count in load.outcomes.items():
        phases.setdefault(phase or "0 %", {})[who] = count
    for counts in phases.values():
        for variant in (ORIGINAL, PRUNED):
            counts.setdefault(variant, 0)
    return phases
