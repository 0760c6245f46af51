"""The original's hidden states between layers, kept for those who need them again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moe_serve.calibration.states import States

KEPT_BYTES: Final = 2**35
"""States of all layers are kept up to so many bytes on disk, and made again beyond."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Hidden states at every layer's entrance and after the last one, L + 1 matrices [T, D]."""

    states: tuple[States, ...]
    known: bool
    """Whether they are there already; otherwise whoever walks the layers fills them."""

    @classmethod
    def kept(cls, folder: Path, *, layers: int, hidden: int, tokens: int) -> Trace:
        """A file for each; known where all of them are whole."""
        files = [folder / f"original-{i}.f32" for i in range(layers + 1)]
        states = tuple(States(file, hidden) for file in files)
        known = all(s.path.exists() and s.path.stat().st_size == s.size(tokens) for s in states)
        return cls(states, known)

    @classmethod
    def passing(cls, folder: Path, *, layers: int, hidden: int) -> Trace:
        """Two files in turn: each lasts until the layer after the next."""
        pair = tuple(States(folder / f"original-{i}.f32", hidden) for i in (0, 1))
        return cls(tuple(pair[i % 2] for i in range(layers + 1)), known=False)

    def size(self, tokens: int) -> int:
        """Bytes on disk for that many tokens."""
        return sum(states.size(tokens) for states in set(self.states))

    def remove(self) -> None:
        """Delete the files."""
        for states in self.states:
            states.remove()
