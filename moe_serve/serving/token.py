"""The control token: a file that only its owner reads, and sessions of the page derived from it."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from moe_serve.errors import ServingError
from moe_serve.files import reading, writing

FILE: Final = "control.token"
SESSION_SECONDS: Final = 12 * 3600
"""How long a login lasts."""


def token_file(state: Path) -> Path:
    """Where the token of a state directory lies."""
    return state / FILE


def make_token(state: Path) -> Path:
    """Create the token, mode 600, where there is none yet; return its path.

    Raises:
        OutputError: it can't be written.
    """
    path = token_file(state)
    with writing(path):
        try:
            # Never readable by others, not even for a moment.
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return path
        with os.fdopen(file, "w") as output:
            output.write(secrets.token_urlsafe(32) + "\n")
    return path


def read_token(state: Path) -> str:
    """The token.

    Raises:
        IncompleteCheckpoint: there is none.
        ServingError: others can read it, or it is too short to be one.
    """
    path = token_file(state)
    with reading(path):
        mode = stat.S_IMODE(path.stat().st_mode)
        token = path.read_text().strip()
    if mode & 0o077:
        raise ServingError(
            f"can be read by others (mode {mode:o})",
            where=str(path),
            remedy="remove it; moe-serve up makes a new one",
        )
    if len(token) < 32:
        raise ServingError(
            "is too short to be a token",
            where=str(path),
            remedy="remove it; moe-serve up makes a new one",
        )
    return token


def same(given: str, token: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(hashlib.sha256(given.encode()).digest(), _digest(token))


def session_name(token: str) -> str:
    """Of the cookie; stacks on one host differ in it, as cookies know no ports."""
    return f"moe_serve_{_digest(token).hex()[:8]}"


def new_session(token: str, now: float) -> str:
    """What the cookie holds: an end and its signature, from which the token can't be got back."""
    ends = f"{int(now) + SESSION_SECONDS}"
    return f"{ends}.{_signature(token, ends)}"


def is_session(value: str, token: str, now: float) -> bool:
    """Whether a cookie's value was made from this token and has not ended."""
    ends, _, signature = value.partition(".")
    genuine = hmac.compare_digest(signature.encode(), _signature(token, ends).encode())
    return genuine and ends.isdecimal() and now < int(ends)


def _signature(token: str, ends: str) -> str:
    return hmac.new(token.encode(), f"page:{ends}".encode(), hashlib.sha256).hexdigest()


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
