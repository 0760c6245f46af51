"""Counters as sources would read them, made up by a test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from moe_serve.rollout.margins import Guards
from moe_serve.rollout.policy import Policy, Step
from moe_serve.rollout.reading import ArmReading, Reading
from moe_serve.rollout.window import Window
from moe_serve.serving.variants import ORIGINAL, PRUNED, VARIANTS

START = 1_800_000_000.0
UNPROBED = Guards(quality="off", garbage="off")
"""What users' requests alone tell."""
PLAIN = Policy(steps=(Step(weight=1.0),), guards=UNPROBED)
"""The default but for its steps, and without probes."""
EMPTY = ArmReading(
    requests=0.0,
    failed=0.0,
    over={"ttft": (0, 0), "tpot": (0, 0)},
    shares={"truncated": (0, 0), "empty": (0, 0), "abandoned": (0, 0), "feedback": (0, 0)},
    running=1.0,
    healthy=True,
)


@dataclass
class Traffic:
    """Grows counters and feeds them into a window."""

    policy: Policy
    window: Window = field(init=False)
    at: float = START
    tick: float = 0.0
    arms: dict[str, ArmReading] = field(default_factory=lambda: dict.fromkeys(VARIANTS, EMPTY))

    def __post_init__(self) -> None:
        """A window under the policy's first step."""
        step = self.policy.steps[0]
        self.window = Window(began=START, weight=step.weight, shadow=step.shadow)

    def read(self, seconds: float = 5.0, changed: Mapping[str, ArmReading] | None = None) -> Window:
        """One reading after ``seconds``, with some arms as given this once."""
        self.at += seconds
        self.tick += seconds
        reading = Reading(at=self.at, tick=self.tick, arms={**self.arms, **(changed or {})})
        self.window.add(reading, self.policy)
        return self.window

    def serve(
        self,
        variant: str,
        requests: float,
        failed: float = 0,
        slow: float = 0,
        load: float = 1.0,
        **of: float,
    ) -> None:
        """Requests since the last reading; ``slow`` of them over both objectives.

        Of the shares that are named, so many are of the kind.
        """
        arm = self.arms[variant]
        self.arms[variant] = replace(
            arm,
            requests=(arm.requests or 0) + requests,
            failed=(arm.failed or 0) + failed,
            over={m: (k + slow, n + requests) for m, (k, n) in arm.over.items()},
            shares={m: (k + of.get(m, 0.0), n + requests) for m, (k, n) in arm.shares.items()},
            running=load,
        )

    def warm(self) -> Window:
        """Past the warm-up, nothing counted."""
        for _ in range(8):
            self.read()
        return self.window

    def steadily(
        self, ticks: int, original: tuple[float, float, float], pruned: tuple[float, float, float]
    ) -> Iterator[Window]:
        """(requests, failed, slow) per reading."""
        for _ in range(ticks):
            self.serve(ORIGINAL, *original)
            self.serve(PRUNED, *pruned)
            yield self.read()
