"""Who decides, and in what words, whatever machine and terminal they sit at."""

from __future__ import annotations

import getpass
import os


def whoami() -> str:
    """The user's name; in a container that knows none, the number."""
    try:
        return printable(getpass.getuser())
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def printable(text: str) -> str:
    """What was typed in another encoding than the terminal's, in characters that can be stored."""
    return text.encode("utf-8", "replace").decode("utf-8")
