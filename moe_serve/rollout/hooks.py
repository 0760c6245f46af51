"""Telling others of a decision. Nothing here can delay or prevent it."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

import httpx

from moe_serve.rollout.policy import Hooks

_PATIENCE: Final = 10.0
"""Seconds for one hook."""

Tell = Callable[[str], None]


def notify(hooks: Hooks, event: Mapping[str, Any], tell: Tell) -> list[threading.Thread]:
    """Start what is to be told, each in a thread of its own; failures go to ``tell``."""
    text = json.dumps(event, sort_keys=True)
    jobs: list[Callable[[], None]] = []
    if hooks.webhook is not None:
        jobs.append(lambda: _post(str(hooks.webhook), text, tell))
    if hooks.command:
        jobs.append(lambda: _run(hooks.command, text, tell))
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    return threads


def _post(url: str, text: str, tell: Tell) -> None:
    try:
        headers = {"content-type": "application/json"}
        httpx.post(url, content=text, headers=headers, timeout=_PATIENCE).raise_for_status()
    except httpx.HTTPError as exc:
        tell(f"the webhook failed ({type(exc).__name__}: {exc})")


def _run(command: tuple[str, ...], text: str, tell: Tell) -> None:
    try:
        subprocess.run(
            command, input=text.encode(), timeout=_PATIENCE, check=True, capture_output=True
        )
    except (OSError, subprocess.SubprocessError) as exc:
        tell(f"the hook's command failed ({exc})")
