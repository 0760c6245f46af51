"""The vLLM releases that the plugin knows, and what it does differently on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A series of vLLM versions."""

    series: str
    """Their first two numbers."""
    tested: bool
    """The tests run with it; of others only the source is compared, again at each start."""
    asks_for_modular: bool
    """A layer can ask for kernels that don't route by themselves."""


RELEASES: Final = (
    Release(series="0.32", tested=True, asks_for_modular=False),
    Release(series="0.33", tested=False, asks_for_modular=True),
)


def release_of(version: str) -> Release | None:
    """The row of a version; ``None`` for one the plugin does not know."""
    return next((r for r in RELEASES if version.startswith(f"{r.series}.")), None)
