"""What commands print: one JSON object on stdout, or words and tables for a person."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

out = Console(highlight=False)
"""Results."""

err = Console(stderr=True, highlight=False)
"""Progress and messages; stdout stays clean for ``--json``."""


def print_json(result: Any) -> None:
    """Print one machine-readable object on stdout."""
    print(json.dumps(result, ensure_ascii=False, sort_keys=True), flush=True)
