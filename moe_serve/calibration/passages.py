"""Which passages texts share, told from hashes: calibration and evaluation must not overlap.

A passage is a run of 128 letters and digits, whatever the spaces, marks and capitals between. About
every 64th is hashed, chosen by its content, so that a copy shows inside another document too; a
document with fewer than four of these gives four of its own, which show in a copy of all of it. A
record keeps 64 bits of each SHA-256 and at most :data:`BOUND` hashes, the smallest: both sides of a
comparison then leave out the same ones.

What this reveals: who holds a passage can tell from a record that it was used, as from the hash of
a file. Nobody can read one back; but a passage that differs from a known one in a few digits can be
found by trying. That is why shorter documents leave nothing, salt would not help (it has to be in
the record), and sources declared to hold personal data leave none.
"""

from __future__ import annotations

import base64
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

LETTERS: Final = 128
"""Of a passage. English carries about one bit a letter: too many to guess."""
BOUND: Final = 8192
"""Hashes in a record: 86 KiB; all passages of about 500,000 letters."""
SHARED: Final = 0.8
"""A document overlaps when so much of it is known. Licence headers and house style alone do not."""
_EVERY: Final = 64
_LEAST: Final = 4
"""Passages that a document is judged by, at least; or all it has."""
_BASE: Final = 0x9E3779B97F4A7C15
_MASK: Final = 2**64 - 1


def passages(text: str, least: int = _LEAST) -> tuple[int, ...]:
    """Hashes of a document's passages in ascending order; none of a short one.

    ``least`` is what a document gives of its own where its content chooses fewer; with 0 what is
    left is found inside a longer document too.
    """
    plain = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())
    if len(plain) < LETTERS:
        return ()
    codes = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    order = _mixed(_rolling(codes.astype(np.uint64)))
    starts = np.flatnonzero(order % np.uint64(_EVERY) == 0).tolist()
    if len(starts) < least:
        starts += np.argsort(order, kind="stable")[:least].tolist()
    return tuple(sorted({_hash(plain[start : start + LETTERS]) for start in starts}))


def _rolling(codes: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A polynomial of every passage, modulo 2⁶⁴: Σᵢ cᵢ bⁱ over it, divided by b at its start."""
    inverse = pow(_BASE, -1, 2**64)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.r_[np.uint64(1), np.full(len(codes) - 1, _BASE, np.uint64)])
        sums = np.r_[np.uint64(0), np.cumsum(codes * powers, dtype=np.uint64)]
        count = len(codes) - LETTERS + 1
        back = np.cumprod(np.r_[np.uint64(1), np.full(count - 1, inverse, np.uint64)])
        found: np.ndarray[Any, np.dtype[np.uint64]] = (sums[LETTERS:] - sums[:count]) * back
        return found


def _mixed(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Spread to all bits (SplitMix64's finaliser); it only chooses, SHA-256 identifies."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray[Any, np.dtype[np.uint64]] = x ^ (x >> np.uint64(31))
        return mixed


def _hash(passage: str) -> int:
    digest = hashlib.sha256(passage.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True, slots=True)
class Known:
    """What a record holds."""

    hashes: frozenset[int]
    below: int = _MASK + 1
    """Hashes from here on were left out."""

    @classmethod
    def of(cls, documents: Iterable[tuple[int, ...]]) -> Known:
        """All passages of some documents, or the smallest :data:`BOUND`."""
        every = sorted({h for document in documents for h in document})
        if len(every) <= BOUND:
            return cls(frozenset(every))
        return cls(frozenset(every[:BOUND]), below=every[BOUND])

    def to_json(self) -> dict[str, Any]:
        """Big-endian 64-bit numbers in ascending order, in Base64."""
        data = np.array(sorted(self.hashes), dtype=">u8").tobytes()
        return {
            "letters": LETTERS,
            "sha256_64": base64.b64encode(data).decode(),
            "below": self.below if self.below <= _MASK else None,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Known:
        """Read back; of passages of another length there is nothing to compare."""
        if record["letters"] != LETTERS:
            return cls(frozenset())
        data = np.frombuffer(base64.b64decode(record["sha256_64"]), dtype=">u8")
        below = record["below"]
        return cls(frozenset(data.tolist()), _MASK + 1 if below is None else below)

    def judges(self, document: Sequence[int]) -> bool:
        """Whether enough of a document can be looked up."""
        found = sum(h < self.below for h in document)
        return bool(document) and found >= min(len(document), _LEAST)

    def overlaps(self, document: Sequence[int]) -> bool:
        """Whether four fifths or more of what can be looked up of a document are known."""
        looked_up = [h for h in document if h < self.below]
        known = sum(h in self.hashes for h in looked_up)
        return self.judges(document) and known >= SHARED * len(looked_up)
