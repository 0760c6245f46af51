"""Small unsigned integers in 32-bit words, and the search for a group's scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

WORD: Final = 32
_SHRINK: Final = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)
"""Shares of a group's range that are tried: clipping the largest may serve the others."""


def pack(codes: torch.Tensor, bits: int, dim: int, order: Sequence[int]) -> torch.Tensor:
    """Put ``32 / bits`` codes along ``dim`` into each word.

    Args:
        codes: I32, a matrix.
        bits: bits per code.
        dim: the dimension that shrinks.
        order: ``order[i]`` is the code, among those of a word, at bits ``i·bits`` and up.
    """
    grouped = codes.to(torch.int32).movedim(dim, -1).unflatten(-1, (-1, WORD // bits))
    words = torch.zeros_like(grouped[..., 0])
    for place, number in enumerate(order):
        words |= grouped[..., number] << (bits * place)
    return words.movedim(-1, dim).contiguous()


def unpack(words: torch.Tensor, bits: int, dim: int, order: Sequence[int]) -> torch.Tensor:
    """Undo :func:`pack`."""
    moved = words.movedim(dim, -1)
    codes = torch.empty(*moved.shape, WORD // bits, dtype=torch.int32, device=words.device)
    for place, number in enumerate(order):
        # An arithmetic shift drags the sign along; the mask takes it off.
        codes[..., number] = (moved >> (bits * place)) & ((1 << bits) - 1)
    return codes.flatten(-2).movedim(-1, dim)


@dataclass(frozen=True, slots=True)
class Groups:
    """Integer codes of groups of weights: weight ≈ (code - zero) · scale."""

    codes: torch.Tensor
    """I32 [rows, groups, columns of a group]."""
    scale: torch.Tensor
    """[rows, groups], in the format it is stored in."""
    zero: torch.Tensor
    """I32 [rows, groups]."""


def fit_groups(
    weight: torch.Tensor, bits: int, dtype: torch.dtype, *, symmetric: bool, least_zero: int = 0
) -> Groups:
    """Codes, scale and zero of each group, by least squared error over a few ranges.

    Args:
        weight: FP32 [rows, groups, columns of a group].
        bits: bits per code.
        dtype: format of the scale; codes are fitted to the rounded scale.
        symmetric: the zero is 2^(bits - 1).
        least_zero: the smallest zero the layout can store.
    """
    top = (1 << bits) - 1
    ranges = _symmetric(weight, bits) if symmetric else _asymmetric(weight, top)
    found: tuple[torch.Tensor, Groups] | None = None
    for wide, low in ranges:
        for share in _SHRINK:
            scale = (wide * share).clamp(min=torch.finfo(dtype).tiny).to(dtype)
            step = scale.float()[..., None]
            if symmetric:
                zero = torch.full_like(low, float(1 << (bits - 1)))
            else:
                zero = (-low * share / step[..., 0]).round().clamp(least_zero, top)
            codes = (weight / step + zero[..., None]).round().clamp(0, top)
            error = ((codes - zero[..., None]) * step - weight).square().sum(dim=-1)
            new = Groups(codes.to(torch.int32), scale, zero.to(torch.int32))
            if found is None:
                found = error, new
                continue
            least, best = found
            better = error < least
            found = (
                torch.where(better, error, least),
                Groups(
                    torch.where(better[..., None], new.codes, best.codes),
                    torch.where(better, new.scale, best.scale),
                    torch.where(better, new.zero, best.zero),
                ),
            )
    if found is None:
        raise ValueError("no range was tried")
    return found[1]


def _symmetric(weight: torch.Tensor, bits: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Steps that put the largest magnitude on either end; the lower end reaches one further."""
    largest = weight.abs().amax(dim=-1)
    half = 1 << (bits - 1)
    steps = (torch.where(largest > 0, largest / end, 1.0) for end in (half - 1, half))
    return [(step, largest) for step in steps]


def _asymmetric(weight: torch.Tensor, top: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    low = weight.amin(dim=-1).clamp(max=0.0)
    high = weight.amax(dim=-1).clamp(min=0.0)
    wide = high - low
    return [(torch.where(wide > 0, wide / top, 1.0), low)]
