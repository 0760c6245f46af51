"""Statistics of a tiny model, gathered by a real calibration."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_serve.calibration.store import Statistics
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.gathering import calibrate
from tests.support.models import write_texts


def calibrated(model: Path, root: Path) -> Statistics:
    """On two domains of random words, 2,048 tokens; the texts stay at ``root/texts.jsonl``."""
    texts = TextOptions(paths=(write_texts(root / "texts.jsonl"),), tokens=1024, length=128)
    return calibrate(model, root / "statistics", texts, torch.device("cpu"), 512, Silent())
