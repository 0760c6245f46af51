"""A context and what may follow it, as one row: the context is computed once for all of it.

Shape suffixes: B rows, L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

_ROOM: Final = 1024
"""Tokens of a row that several continuations may always fill together."""
_MOST: Final = 8192
"""And those they never go beyond: a row's mask is this large squared."""

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fork:
    """One context and the continuations that are asked about after it."""

    context: tuple[int, ...]
    """At least one token."""
    continuations: tuple[tuple[int, ...], ...]

    @property
    def plain(self) -> bool:
        """Whether it is a text as any other."""
        return len(self.continuations) == 1

    @property
    def length(self) -> int:
        """L. Nothing is asked of what comes after a continuation's last token."""
        return len(self.context) + sum(len(c[:-1]) for c in self.continuations)

    def row(self, length: int) -> tuple[Tokens, Tokens, Tokens]:
        """Ids, places in the text and branches (0: the context), each [length].

        Filled up with tokens that nobody looks at: attention looks back only.
        """
        parts = [(0, 0, self.context)]
        parts += [(n, len(self.context), c[:-1]) for n, c in enumerate(self.continuations, 1)]
        found = np.zeros((3, length), dtype=np.int64)
        at = 0
        for branch, first, ids in parts:
            found[:, at : at + len(ids)] = (
                np.asarray(ids, dtype=np.int64),
                np.arange(first, first + len(ids)),
                np.full(len(ids), branch),
            )
            at += len(ids)
        found[2, at:] = len(self.continuations)
        return found[0], found[1], found[2]

    def outputs(self) -> Iterator[list[int]]:
        """For each continuation, where in the row its tokens are predicted."""
        before, at = len(self.context) - 1, len(self.context)
        for continuation in self.continuations:
            rest = len(continuation[:-1])
            yield [before, *range(at, at + rest)][: len(continuation)]
            at += rest

    def parts(self) -> Iterator[Fork]:
        """Itself, or several that share the context, where it would be too long a row."""
        room = min(max(_ROOM, 2 * len(self.context)), _MOST)
        taken: list[tuple[int, ...]] = []
        length = len(self.context)
        for continuation in self.continuations:
            more = len(continuation[:-1])
            if taken and length + more > room:
                yield Fork(context=self.context, continuations=tuple(taken))
                taken, length = [], len(self.context)
            taken.append(continuation)
            length += more
        yield Fork(context=self.context, continuations=tuple(taken))


def forked(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[Fork, list[int]]:
    """Pairs of context and continuation, gathered by context; with each pair's number."""
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(pairs):
        numbers.setdefault(context, []).append(number)
    return {
        Fork(context=context, continuations=tuple(pairs[n][1] for n in found)): found
        for context, found in numbers.items()
    }


def visible(branch_BL: torch.Tensor) -> torch.Tensor:
    """What attention sees, [B, 1, L, L]: the context and the own branch, up to itself."""
    to_B1L, from_BL1 = branch_BL[:, None, :], branch_BL[:, :, None]
    length = branch_BL.shape[1]
    past_LL = torch.ones(length, length, dtype=torch.bool, device=branch_BL.device).tril()
    return (past_LL & ((to_B1L == 0) | (to_B1L == from_BL1)))[:, None]
