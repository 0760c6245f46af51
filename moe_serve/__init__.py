"""Prune Mixture-of-Experts models, serve the result in vLLM, and roll it out safely.

What the commands call, for programs::

    from moe_serve import PruneRequest, Selection, TextOptions, compare, prune

Each name is imported when it is used: rolling back must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moe_serve.version import __version__

if TYPE_CHECKING:
    from moe_serve.checkpoint.export import export as export
    from moe_serve.errors import MoeServeError as MoeServeError
    from moe_serve.evaluation.comparison import Comparison as Comparison
    from moe_serve.evaluation.comparison import compare as compare
    from moe_serve.evaluation.inspection import inspect as inspect
    from moe_serve.pruning.corpus import TextOptions as TextOptions
    from moe_serve.pruning.gathering import calibrate as calibrate
    from moe_serve.pruning.records.verify import verify as verify
    from moe_serve.pruning.request import PruneRequest as PruneRequest
    from moe_serve.pruning.run import PruneResult as PruneResult
    from moe_serve.pruning.run import prune as prune
    from moe_serve.pruning.selection import Selection as Selection

_HOMES = {
    "Comparison": "evaluation.comparison",
    "MoeServeError": "errors",
    "PruneRequest": "pruning.request",
    "PruneResult": "pruning.run",
    "Selection": "pruning.selection",
    "TextOptions": "pruning.corpus",
    "calibrate": "pruning.gathering",
    "compare": "evaluation.comparison",
    "export": "checkpoint.export",
    "inspect": "evaluation.inspection",
    "prune": "pruning.run",
    "verify": "pruning.records.verify",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 - names, all of them strings


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
