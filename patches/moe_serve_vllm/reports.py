"""What a worker tells the API server: bytes of weights and cache, how often experts were selected.

The API server names a directory in the environment before it starts its workers; each writes one
small JSON file there, from a thread of its own, and never a word of what was asked or answered.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from moe_serve_vllm.errors import UnsupportedSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FOLDER: Final = "MOE_SERVE_REPORTS"
"""Variable: the directory; set by the API server."""
SELECTIONS: Final = "MOE_SERVE_EXPERT_SELECTIONS"
"""Variable: count the experts of every n-th token of a batch; unset: of none."""
READY: Final = "ready"
"""File in the directory: the engine has started, what is computed from now on was asked for."""
_SECONDS: Final = 2.0
_reporters: list[Reporter] = []


class Selections(nn.Module):
    """Counts [N] of how often each original expert was selected."""

    counts: torch.Tensor

    def __init__(self, experts: int, every: int) -> None:
        """Start at zero; ``every`` n-th token of a batch is counted."""
        super().__init__()
        self.every = every
        self.register_buffer("counts", torch.zeros(experts, dtype=torch.int64), persistent=False)

    def forward(self, ids_TK: torch.Tensor) -> None:
        """Add a batch. Nothing is read back to the host, so it can be part of a CUDA graph.

        Rows with which vLLM pads a batch to the size of a graph are counted too.
        """
        index = ids_TK[:: self.every].flatten().long()
        self.counts.scatter_add_(0, index, torch.ones_like(index))


def counted_tokens() -> int:
    """Every how many-th token is counted; 0: none.

    Raises:
        UnsupportedSettings: the variable holds something else.
    """
    value = os.environ.get(SELECTIONS, "0")
    if not value.isdecimal():
        raise UnsupportedSettings(
            SELECTIONS, [f"{value!r} is not a whole number"], "count every n-th token, or unset it"
        )
    return int(value)


class Reporter(threading.Thread):
    """Writes this process's file every two seconds, once the engine has started."""

    def __init__(self, folder: Path, vllm_config: VllmConfig) -> None:
        """Report on the model that is built with these settings."""
        super().__init__(name="moe-serve-reports", daemon=True)
        self._folder = folder
        self._layers: Any = vllm_config.compilation_config.static_forward_context
        self.weights: int | None = None
        """Bytes of the parameters, where our loader filled them; kernels pack them later."""
        self.selections: dict[int, Selections] = {}

    def run(self) -> None:
        """Wait for the engine, then report until the directory is gone."""
        while not (self._folder / READY).exists():
            if not self._folder.exists():
                return
            time.sleep(0.2)
        # Warming up selects experts too.
        for counter in self.selections.values():
            counter.counts.zero_()
        file = self._folder / f"{os.getpid()}.json"
        while self._folder.exists():
            partial = file.with_suffix(".partial")
            try:
                partial.write_text(json.dumps(self.report()))
                partial.replace(file)
            except OSError:
                return
            time.sleep(_SECONDS)

    def report(self) -> dict[str, Any]:
        """Bytes by kind and counts by layer."""
        caches = [getattr(layer, "kv_cache", None) for layer in self._layers.values()]
        found = {"kv_cache": bytes_of(c for c in caches if isinstance(c, torch.Tensor))}
        if self.weights is not None:
            found["weights"] = self.weights
        counts = {layer: s.counts.tolist() for layer, s in self.selections.items()}
        return {"memory": found, "selections": counts}


def watch(vllm_config: VllmConfig) -> Reporter | None:
    """This process's reporter, started once; ``None`` where nobody reads it."""
    folder = os.environ.get(FOLDER)
    if folder and not _reporters:
        _reporters.append(Reporter(Path(folder), vllm_config))
        _reporters[0].start()
    return _reporters[0] if _reporters else None


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Memory of the tensors, what several share counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
