"""One offline run as a user asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.device import CPU
from moe_serve.pruning.selection import Selection

DEFAULT_BATCH: Final = 4096
"""Tokens in memory at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneRequest:
    """One offline run."""

    model: Path
    """The original checkpoint."""
    output: Path
    """Folder to make; an unfinished one is resumed."""
    texts: TextOptions
    """What is calibrated and re-fitted on."""
    selection: Selection
    """How much to keep, and how it is chosen."""
    form: str = "compact"
    """``compact``, ``tied``, ``native`` or ``substitution``."""
    device: torch.device = CPU
    """Where is computed."""
    batch_tokens: int = DEFAULT_BATCH
    """Tokens in memory at once."""
    plan: Path | None = None
    """Carry out this plan instead of making one."""
    statistics: Path | None = None
    """Use these statistics, or keep the run's here when the folder does not exist."""
