"""How many requests came from how many users: what sticky requests are worth as evidence.

A user stays on one variant, so a user's requests tell less than as many of different users. The
proxy writes a line per request of a user whom it can tell apart (time, a hash, the variant, status,
flags, milliseconds); here they are summed since a moment. No name is read and none is kept.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from moe_serve.serving.variants import VARIANTS

_NUMBER: Final = re.compile(r"[0-9]{1,12}")
_USER: Final = re.compile(r"[0-9a-f]{16}")
_MOST: Final = 100_000
"""Users held; beyond, every second one is let go, by hash, with all of their requests."""

_FAILED: Final = frozenset({"UC", "UF", "UPE", "UR", "UT"})
"""Envoy's flags of an engine that broke off, before an answer or in it."""
_LEFT: Final = "DC"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One request of a user who can be told apart."""

    at: int
    """Seconds since the epoch."""
    user: str
    """A hash."""
    variant: str
    failed: bool
    left: bool
    """Its client went away before the end."""
    seconds: float
    """From its arrival to the end of its answer."""


def lines(text: bytes) -> Iterator[Line]:
    """Those that are whole; a disk that was full, or a hand, may have left anything."""
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        parts = line.decode("ascii", "replace").split()
        if len(parts) != 6 or parts[2] not in VARIANTS:
            continue
        at, user, variant, status, flags, milliseconds = parts
        numbers = all(_NUMBER.fullmatch(x) for x in (at, status, milliseconds))
        if numbers and _USER.fullmatch(user):
            yield Line(
                at=int(at),
                user=user,
                variant=variant,
                failed=int(status) >= 500 or not _FAILED.isdisjoint(flags.split(",")),
                left=_LEFT in flags.split(","),
                seconds=int(milliseconds) / 1000.0,
            )


Crowd = list[float]
"""[requests of users told apart, sum over these users of their requests squared]."""


@dataclass(kw_only=True, slots=True)
class Users:
    """Reads the proxy's file on, as it grows."""

    path: Path
    most: int = _MOST
    _since: float | None = None
    _offset: int = 0
    _requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    _halved: int = 0
    _failures: deque[Line] = field(default_factory=deque)

    def since(self, moment: float) -> dict[str, Crowd]:
        """Variant → its crowd since then; the file is read again from its start for another moment.

        Args:
            moment: seconds since the epoch.
        """
        if moment != self._since:
            self._since, self._offset, self._halved = moment, 0, 0
            self._requests.clear()
            self._failures.clear()
        self._read_on(int(moment))
        found = {variant: [0.0, 0.0] for variant in VARIANTS}
        for (variant, _), number in self._requests.items():
            found[variant][0] += number
            found[variant][1] += number * number
        scale = 2.0**self._halved
        return {variant: [scale * value for value in crowd] for variant, crowd in found.items()}

    def worst(self, variant: str, since: float) -> int:
        """Failures since then of the one user who had most of them; what was read so far."""
        while self._failures and self._failures[0].at < since:
            self._failures.popleft()
        found = Counter(x.user for x in self._failures if x.variant == variant and x.at >= since)
        return max(found.values(), default=0)

    def _read_on(self, moment: int) -> None:
        try:
            with self.path.open("rb") as file:
                if self.path.stat().st_size < self._offset:
                    # Cut by whoever keeps it small; what was read is kept.
                    self._offset = 0
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return
        self._offset += text.rfind(b"\n") + 1
        for line in lines(text):
            if line.failed:
                self._failures.append(line)
                if len(self._failures) > self.most:
                    self._failures.popleft()
            if line.at >= moment and self._held(line.user):
                self._add(line)

    def _add(self, line: Line) -> None:
        self._requests[line.variant, line.user] += 1
        if len(self._requests) > self.most:
            self._halved += 1
            for key in [key for key in self._requests if not self._held(key[1])]:
                del self._requests[key]

    def _held(self, user: str) -> bool:
        return not self._halved or int(user, 16) % 2**self._halved == 0
