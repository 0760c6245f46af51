"""The two things that are compared."""

from __future__ import annotations

from typing import Final

ORIGINAL: Final = "original"
PRUNED: Final = "pruned"
VARIANTS: Final = (ORIGINAL, PRUNED)
HEADER: Final = "x-moe-serve-variant"
"""In a response: who answered. In a request: who must answer."""
