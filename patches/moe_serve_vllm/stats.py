"""Our metrics at the engine's own ``/metrics``.

vLLM imports this in the API server, through the entry-point group ``vllm.stat_logger_plugins``,
before it starts the engine: so the directory for the workers' reports is made here. With several
API servers (``--api-server-count``) vLLM shows its own metrics only.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import StatLoggerBase

from moe_serve_vllm.reports import FOLDER, READY

if TYPE_CHECKING:
    from vllm.config import VllmConfig

VARIANT: Final = "MOE_SERVE_VARIANT"
"""Variable: the label ``variant``; without it, a compact checkpoint is the pruned one."""


def _make_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="moe-serve-reports-"))
    os.environ[FOLDER] = str(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


_folder: Final = _make_folder()
_registered: list[Reports] = []


class EngineStats(StatLoggerBase):
    """Registers the collector; what it reports is read when ``/metrics`` is."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        """Register once per server."""
        if engine_index == 0 and not _registered:
            _registered.append(Reports(_folder, vllm_config))
            REGISTRY.register(_registered[0])

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Nothing is gathered per step."""

    def log_engine_initialized(self) -> None:
        """From now on the workers count."""
        (_folder / READY).touch()


class Reports(Collector):
    """The workers' reports, added up."""

    def __init__(self, folder: Path, vllm_config: VllmConfig) -> None:
        """Read ``folder``; labels come from the settings."""
        architectures = vllm_config.model_config.hf_config.architectures or ()
        compact = any(name.startswith("Compact") for name in architectures)
        served = vllm_config.model_config.served_model_name
        model = served[0] if isinstance(served, list) else served
        self._who = [os.environ.get(VARIANT, "pruned" if compact else "original"), str(model)]
        self._folder = folder
        self._cache = vllm_config.cache_config

    def describe(self) -> Iterator[Metric]:
        """The families, so that registering reads nothing."""
        yield from self._families()

    def collect(self) -> Iterator[Metric]:
        """One pass over the files."""
        memory, capacity, selected = self._families()
        kinds: Counter[str] = Counter()
        counts: dict[tuple[str, int], int] = {}
        for file in sorted(self._folder.glob("*.json")):
            report = json.loads(file.read_text())
            kinds.update(report["memory"])
            for layer, numbers in report["selections"].items():
                for expert, count in enumerate(numbers):
                    # Tensor-parallel workers all see the same tokens.
                    key = (layer, expert)
                    counts[key] = max(counts.get(key, 0), count)
        for kind, size in sorted(kinds.items()):
            memory.add_metric([*self._who, kind], size)
        if self._cache.num_gpu_blocks:
            capacity.add_metric(self._who, self._cache.num_gpu_blocks * self._cache.block_size)
        for (layer, expert), count in counts.items():
            selected.add_metric([*self._who, layer, str(expert)], count)
        yield from (family for family in (memory, capacity, selected) if family.samples)

    def _families(self) -> tuple[GaugeMetricFamily, GaugeMetricFamily, CounterMetricFamily]:
        who = ["variant", "model"]
        return (
            GaugeMetricFamily(
                "moe_serve_engine_memory_bytes",
                "An engine's memory by kind, as its workers hold it: weights, kv_cache.",
                labels=[*who, "kind"],
            ),
            GaugeMetricFamily(
                "moe_serve_kv_cache_capacity_tokens",
                "Tokens whose keys and values fit the engine's cache.",
                labels=who,
            ),
            CounterMetricFamily(
                "moe_serve_expert_selections_total",
                "How often each original expert was selected, of the tokens counted.",
                labels=[*who, "layer", "expert"],
            ),
        )
