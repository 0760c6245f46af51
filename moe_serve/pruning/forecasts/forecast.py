"""What a run will read, compute, hold and write, before it starts.

The formulas of its steps are in ``steps.py`` and ``healing.py``; seconds follow from rates that are
measured on the machine (``probe.py``) or given.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Per second, of this machine."""

    flops: float
    """FP32, in products of the experts' shape, on the device."""
    processor_flops: float
    """The same on the processor."""
    read: float
    write: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One part of a run."""

    name: str
    passes: int
    """Times that every expert's weights are read, hashing included."""
    flops: float
    read: int
    """Bytes of the checkpoint, or of what was made from it."""
    written: int
    memory: int
    """Peak, beyond what the interpreter and its libraries take."""
    disk: int
    """Files that the finished output does not keep."""
    processor_flops: float = 0.0
    """Of what stays on the processor whatever the device."""

    def seconds(self, rates: Rates) -> float:
        """Computing, reading and writing one after the other."""
        computing = self.flops / rates.flops + self.processor_flops / rates.processor_flops
        return computing + self.read / rates.read + self.written / rates.write


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """A whole run."""

    steps: tuple[Step, ...]
    output_bytes: int
    base_memory: int

    @property
    def passes(self) -> int:
        """Times that every expert's weights are read, hashing included."""
        return sum(step.passes for step in self.steps)

    @property
    def memory(self) -> int:
        """Peak resident bytes."""
        return self.base_memory + max(step.memory for step in self.steps)

    @property
    def disk(self) -> int:
        """Bytes needed at the output while it runs."""
        return self.output_bytes + max(step.disk for step in self.steps)

    def seconds(self, rates: Rates) -> float:
        """All steps."""
        return sum(step.seconds(rates) for step in self.steps)

    def to_json(self, rates: Rates) -> dict[str, Any]:
        """For ``--dry-run --json``."""
        return {
            "passes": self.passes,
            "peak_memory_bytes": self.memory,
            "disk_bytes": self.disk,
            "output_bytes": self.output_bytes,
            "seconds": round(self.seconds(rates), 1),
            "rates": asdict(rates),
            "steps": [asdict(s) | {"seconds": round(s.seconds(rates), 1)} for s in self.steps],
        }
