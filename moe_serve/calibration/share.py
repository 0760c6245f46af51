"""A share of the calibration sequences: what one machine of several observes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from moe_serve.errors import UsageError

_FORM: Final = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class Share:
    """Every ``of``-th sequence, beginning with number ``index``.

    Sequences of a domain are neighbours, so each share holds about as much of every domain.
    """

    index: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """Read ``2/4``, the second of four.

        Raises:
            UsageError: it is no such thing.
        """
        if found := _FORM.fullmatch(text.strip()):
            number, of = int(found[1]), int(found[2])
            if 1 <= number <= of:
                return cls(number - 1, of)
        raise UsageError(
            f"is {text!r}", where="--shard", remedy="give 1/4 for the first of four shards"
        )

    def part(self, index: int, of: int) -> Share:
        """A share of this share; all ``of`` of them are the whole of it."""
        return Share(self.index + self.of * index, self.of * of)

    def numbers(self, sequences: int) -> range:
        """Which of so many sequences belong to it.

        Raises:
            UsageError: none does.
        """
        if self.index >= sequences:
            raise UsageError(
                f"{self.of} shards of {sequences} sequences leave some with none",
                where="--shard",
                remedy=f"use at most {sequences} shards, more --tokens, or shorter sequences",
            )
        return range(self.index, sequences, self.of)

    def __str__(self) -> str:
        """As given on the command line."""
        return f"{self.index + 1}/{self.of}"


WHOLE: Final = Share()
