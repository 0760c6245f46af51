"""Whether the installed package is still the one that this process began with.

A process that outlives an upgrade runs old code against new templates and lazily imports new
modules into old ones. What goes wrong then is obscure; why it does is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).parents[1]
_REMEDY: Final = "restart moe-serve up to run what is installed now"

Files = dict[str, tuple[int, int]]


def _files(root: Path) -> Files:
    """File → (bytes, nanoseconds of its last change), of all that a process may still read."""
    found = {}
    for path in root.rglob("*"):
        if path.suffix not in ("", ".pyc") and "__pycache__" not in path.parts:
            try:
                stat = path.stat()
            except OSError:
                # Gone while it was listed.
                continue
            found[str(path.relative_to(root))] = (stat.st_size, stat.st_mtime_ns)
    return found


class Installed:
    """The package's files as they were when this was made."""

    def __init__(self, root: Path = _ROOT) -> None:
        """Look at them."""
        self._root, self._before = root, _files(root)

    def changed(self) -> str:
        """What is to be said where they are others now; empty where they are the same."""
        now, before = _files(self._root), self._before
        names = now.keys() | before.keys()
        others = sorted(name for name in names if now.get(name) != before.get(name))
        if not others:
            return ""
        return (
            f"the installed package changed while this process ran ({len(others)} files, such as"
            f" {others[0]}); {_REMEDY}"
        )
