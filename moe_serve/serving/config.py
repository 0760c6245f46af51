"""``stack.toml``: what ``moe-serve up`` starts."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_serve.errors import UsageError
from moe_serve.serving.variants import ORIGINAL, PRUNED


class StackConfig(BaseModel):
    """Every field can also be given on the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    original: Path
    """Checkpoint of the original model."""
    pruned: Path
    """Checkpoint of the pruned model, compact or stock."""
    host: str = "127.0.0.1"
    """Address of the OpenAI endpoint. Loopback unless you say otherwise."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port of the OpenAI endpoint."""
    control_port: int = Field(default=8001, ge=1, le=65535)
    """Port of API and metrics, on loopback."""
    state: Path = Path("moe-serve-state")
    """Directory for routes, logs and the database; kept over restarts."""
    policy: Path | None = None
    """Policy of automatic rollouts; with one a controller watches, and ``rollout start`` begins."""
    model: str | None = None
    """The public model name; by default the original's directory name."""
    engine_args: tuple[str, ...] = ()
    """More arguments for both engines, as vLLM's server takes them."""
    original_args: tuple[str, ...] = ()
    """More arguments for the original's engine only."""
    pruned_args: tuple[str, ...] = ()
    """More arguments for the pruned model's engine only."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """KV-cache size of each engine on a machine without a GPU."""
    ready_seconds: float = Field(default=600.0, gt=0)
    """How long an engine may take to start."""
    drain_seconds: float = Field(default=30.0, ge=0)
    """How long running requests may take to end after SIGTERM."""

    def models(self) -> dict[str, Path]:
        """Variant → checkpoint."""
        return {ORIGINAL: self.original, PRUNED: self.pruned}

    def arguments(self, variant: str) -> tuple[str, ...]:
        """Extra engine arguments of a variant."""
        own = self.original_args if variant == ORIGINAL else self.pruned_args
        return (*self.engine_args, *own)

    @property
    def served_model(self) -> str:
        """The name clients use."""
        return self.model or self.original.resolve().name


def load_stack_config(path: Path | None, overrides: dict[str, object]) -> StackConfig:
    """Read the file, if there is one, and put the command line's values over it.

    Raises:
        UsageError: unreadable, or naming every field that is wrong.
    """
    values: dict[str, object] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
            raise UsageError(f"cannot be read ({exc})", where=str(path)) from exc
    values |= {key: value for key, value in overrides.items() if value is not None}
    try:
        return StackConfig.model_validate(values)
    except ValidationError as exc:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in exc.errors()]
        raise UsageError(
            "; ".join(problems),
            where=str(path or "options"),
            remedy="give --original and --pruned, or correct stack.toml",
        ) from exc
