"""``stack.json`` in the state directory: where everything of a running stack is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from moe_serve.errors import RolloutError
from moe_serve.files import read_json, write_json
from moe_serve.serving.listener import Edge

STACK: Final = "stack.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineState:
    """One engine."""

    url: str
    model: str
    pid: int | None = None
    """``None`` where it was not started here."""
    log: str = ""
    weights: str = ""
    """:func:`~moe_serve.serving.identity.identity` of what it loaded; empty where unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StackState:
    """A running stack, as other processes find it."""

    pid: int
    endpoint: str
    control: str
    admin: str
    """Envoy's admin address, host:port on loopback; empty where an HTTPRoute splits."""
    envoy_pid: int
    served_model: str
    engines: dict[str, EngineState]
    edge: Edge | None = None
    """What clients meet; commands that change keys write it again."""
    http_route: str | None = None
    """``namespace/name`` of the HTTPRoute that splits; ``None``: our own Envoy does."""
    http_route_restores: bool = False
    """Whether weights in it that someone else wrote are put back."""
    policy: str | None = None
    """File of the rollout's policy, where ``up`` was given one."""
    shares_gpu: bool = False
    """Whether the original may be asleep, and has to be woken before traffic goes to it."""

    def models(self) -> dict[str, str]:
        """Variant → what tells its checkpoint from another, even one in the same place."""
        return {name: engine.weights or engine.model for name, engine in self.engines.items()}

    def save(self, folder: Path) -> None:
        """Write ``stack.json`` atomically."""
        write_json(folder / STACK, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> StackState:
        """Read it.

        Raises:
            RolloutError: there is none here.
        """
        path = folder / STACK
        if not path.exists():
            raise RolloutError(
                f"holds no {STACK}",
                where=str(folder),
                remedy="give the --state directory of a running moe-serve up",
            )
        value: dict[str, Any] = read_json(path)
        engines = {name: EngineState(**engine) for name, engine in value.pop("engines").items()}
        edge = value.pop("edge", None)
        return cls(engines=engines, edge=Edge(**edge) if edge else None, **value)
