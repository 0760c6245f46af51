"""How a vLLM engine is started for a checkpoint."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moe_serve.errors import ServingError
from moe_serve.families import rotates_slices, serving_obstacle
from moe_serve.files import read_json
from moe_serve.serving import sharing
from moe_serve.serving.envoy import KEEP_ALIVE_SECONDS
from moe_serve.serving.process import Child, start

_SERVER: Final = "vllm.entrypoints.openai.api_server"
_UNLOGGED: Final = "/health,/metrics,/is_sleeping"
"""What proxy, controller and ``up`` ask all the time: a line for each would fill the disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """One engine to start."""

    variant: str
    model: Path
    served_model: str
    port: int
    log: Path
    arguments: tuple[str, ...] = ()
    kv_cache_gib: int = 1
    sleeps: bool = False
    """Whether it can be sent to sleep."""

    @property
    def url(self) -> str:
        """Its address on loopback."""
        return f"http://127.0.0.1:{self.port}"

    def command(self, *, gpu: bool) -> list[str]:
        """The command line.

        Raises:
            CheckpointError: the model has no readable config.
        """
        config = read_json(self.model / "config.json")
        return [
            sys.executable,
            *("-m", _SERVER),
            *("--model", str(self.model)),
            *("--served-model-name", self.served_model),
            *("--host", "127.0.0.1"),
            *("--port", str(self.port)),
            *("--disable-access-log-for-endpoints", _UNLOGGED),
            *_for_checkpoint(config),
            *(() if gpu else _for_cpu(config)),
            *(sharing.ARGUMENTS if self.sleeps else ()),
            *self.arguments,
        ]

    def launch(self, *, gpu: bool, yielding: bool = True) -> Child:
        """Start it; it is ready later.

        Args:
            gpu: whether it computes on one.
            yielding: where it computes on the processor, leave that to others when they want it.
        """
        environment = {
            "MOE_SERVE_VARIANT": self.variant,
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS),
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.sleeps:
            environment |= sharing.ENVIRONMENT
        if not gpu:
            environment["VLLM_CPU_KVCACHE_SPACE"] = str(self.kv_cache_gib)
        # An engine that computes on the processor would keep Envoy waiting for its turn, for
        # seconds where there are few cores.
        return start(
            f"{self.variant} engine",
            self.command(gpu=gpu),
            self.log,
            environment,
            yielding=yielding and not gpu,
        )


def require_servable(model: Path, *, gpu: bool) -> None:
    """Before an engine is started: that it would serve this checkpoint, and rightly.

    Raises:
        CheckpointError: the model has no readable config.
        ServingError: it would not; with the reason and the way out.
    """
    if found := serving_obstacle(read_json(model / "config.json"), gpu=gpu):
        what, remedy = found
        raise ServingError(what, where=str(model), remedy=remedy)


def _for_checkpoint(config: dict[str, Any]) -> tuple[str, ...]:
    return ("--load-format", "moe_serve") if "compact_experts" in config else ()


def _for_cpu(config: dict[str, Any]) -> tuple[str, ...]:
    """Eager mode: compiling takes minutes on a CPU and gains little."""
    options = ["--enforce-eager"]
    if rotates_slices(config):
        # vLLM 0.32's rotary kernel for CPUs ignores the stride of a sliced query.
        options += ["--compilation-config", '{"custom_ops": ["all", "-rotary_embedding"]}']
        # By itself it takes a kernel for BF16 alone on processors with AMX, and fails in FP32.
        options += ["--attention-backend", "CPU_MLA"]
    return tuple(options)


def has_gpu() -> bool:
    """Whether an NVIDIA driver sees a GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return False


def is_ready(spec: EngineSpec, child: Child) -> bool:
    """Whether the engine answers.

    Raises:
        ServingError: it has ended, with its last log lines.
    """
    if child.exit_code is not None:
        raise ServingError(
            f"ended with exit code {child.exit_code} while starting:\n{child.tail()}\n",
            where=child.name,
            remedy=f"the whole log is {child.log}",
        )
    return sharing.answers(spec.url)
