"""What the plugin refuses."""

from __future__ import annotations

from collections.abc import Sequence


class CompactError(ValueError):
    """A compact checkpoint or an engine setting that can't be served, with all reasons at once."""

    def __init__(self, where: str, problems: Sequence[str], remedy: str) -> None:
        """Join the reasons into one message."""
        self.where = where
        self.problems = tuple(problems)
        super().__init__(f"moe_serve: {where}: {'; '.join(problems)}; {remedy}")


class TableError(CompactError):
    """``compact_experts`` in ``config.json`` is damaged."""


class WeightsError(CompactError):
    """The safetensors files are not what the table says."""


class UnsupportedSettings(CompactError):
    """The engine was started with options that compact experts don't support."""
