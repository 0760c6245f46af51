"""A stack started by the command, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_serve.serving.ports import free_port


@dataclass(frozen=True, kw_only=True)
class Running:
    """A stack started by the command."""

    process: subprocess.Popen[str]
    info: dict[str, Any]

    @property
    def endpoint(self) -> str:
        """The OpenAI endpoint."""
        return str(self.info["endpoint"])

    @property
    def engines(self) -> dict[str, str]:
        """Variant → its engine's URL."""
        return dict(self.info["engines"])

    @property
    def token(self) -> dict[str, str]:
        """The header that may write."""
        return {"authorization": f"Bearer {Path(self.info['token_file']).read_text().strip()}"}

    def rollout(self, *arguments: str) -> dict[str, Any]:
        """Run ``moe-serve rollout … --json``."""
        command = [sys.executable, "-m", "moe_serve", "rollout", *arguments]
        done = subprocess.run(
            [*command, "--state", self.info["state"], "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(json.loads(done.stdout))


def command(original: Path, pruned: Path, state: Path, *more: str) -> list[str]:
    """``moe-serve up --json``."""
    return [
        *(sys.executable, "-m", "moe_serve", "up", "--json", "--state", str(state)),
        *("--original", str(original), "--pruned", str(pruned)),
        *("--port", str(free_port()), "--control-port", str(free_port()), *more),
    ]
