"""Telling others of a decision. Nothing here can delay or prevent it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import httpx

from moe_serve.rollout.policy import Hooks

_PATIENCE: Final = 10.0
"""Seconds for one attempt."""
_PAUSES: Final = (1.0, 5.0, 25.0, 125.0)
"""Seconds before each further attempt."""
_PASSING: Final = frozenset({408, 425, 429})
"""Refusals that may not last; others of the client's kind do."""
_PREFIX: Final = "whsec_"

Tell = Callable[[str], None]


def notify(hooks: Hooks, event: Mapping[str, Any], tell: Tell) -> list[threading.Thread]:
    """Start what is to be told, each in a thread of its own; failures go to ``tell``."""
    text = json.dumps(event, sort_keys=True)
    jobs: list[Callable[[], None]] = []
    if hooks.webhook is not None:
        jobs.append(lambda: _deliver(str(hooks.webhook), hooks.secret, text, tell))
    if hooks.command:
        jobs.append(lambda: _run(hooks.command, text, tell))
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    return threads


def signature(key: bytes, identity: str, at: str, text: str) -> str:
    """Of a message, as Standard Webhooks 1.0 has it."""
    digest = hmac.new(key, f"{identity}.{at}.{text}".encode(), hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def _key(path: Path) -> bytes:
    """From its file: ``whsec_`` and base64, or any other text as it is."""
    text = path.read_text(encoding="utf-8").strip()
    if not text:
        raise ValueError("it is empty")
    if text.startswith(_PREFIX):
        return base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    return text.encode()


def _deliver(url: str, secret: Path | None, text: str, tell: Tell) -> None:
    """Post until it is taken; the id stays, so that a receiver knows it when it comes twice."""
    try:
        key = _key(secret) if secret is not None else None
    except (OSError, ValueError, binascii.Error) as exc:
        tell(f"the webhook was not told: its key in {secret} can't be used ({exc})")
        return
    identity = f"msg_{uuid.uuid4().hex}"
    failed = ""
    for pause in (0.0, *_PAUSES):
        time.sleep(pause)
        at = f"{int(time.time())}"
        headers = {
            "content-type": "application/json",
            "webhook-id": identity,
            "webhook-timestamp": at,
        }
        if key is not None:
            headers["webhook-signature"] = signature(key, identity, at, text)
        # Whatever is told of a failure goes without the address, which may be a secret.
        try:
            code = httpx.post(url, content=text, headers=headers, timeout=_PATIENCE).status_code
        except httpx.HTTPError as exc:
            failed = type(exc).__name__
            continue
        if code < 300:
            return
        failed = f"status {code}"
        if code < 500 and code not in _PASSING:
            break
    tell(f"the webhook was not told ({failed})")


def _run(command: tuple[str, ...], text: str, tell: Tell) -> None:
    try:
        subprocess.run(
            command, input=text.encode(), timeout=_PATIENCE, check=True, capture_output=True
        )
    except (OSError, subprocess.SubprocessError) as exc:
        # Its arguments may hold a secret.
        tell(f"the hook's command {command[0]} failed ({type(exc).__name__})")
