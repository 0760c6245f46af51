"""Content hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from moe_serve.files import reading


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
