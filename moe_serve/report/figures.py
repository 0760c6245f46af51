"""Figures as coordinates and paths; the templates put them into inline SVG.

Shape suffixes: N experts, G points of a removal curve, R rows, C columns.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import dendrogram, fcluster, linkage
from scipy.spatial.distance import squareform

from moe_serve.report.facts import Expert, Layer

STRIP_WIDTH: Final = 120
STRIP_HEIGHT: Final = 36
_LABEL: Final = 0.08
"""Height of a label where curves end, over the height of the drawing."""
_LIGHT: Final = np.array([236, 242, 250])
_MIDDLE: Final = np.array([86, 148, 221])
_DEEP: Final = np.array([13, 54, 107])

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Strip:
    """An expert's neurons from the cheapest to the dearest: height is cost, the class its fate."""

    removed: str
    kept: str
    tone: str
    """``kept`` or ``merged``."""


def strips(layer: Layer, bars: int) -> list[Strip]:
    """One strip per expert; heights share the layer's scale, by cube root.

    Args:
        layer: whose experts.
        bars: bars per strip at most.
    """
    if not layer.removed_G:
        return [_flat(e) for e in layer.experts]
    points = np.unique(np.linspace(0, len(layer.removed_G) - 1, bars + 1).round().astype(int))
    edges = np.array(layer.removed_G)[points]
    per_neuron_NB = np.maximum(np.diff(layer.error_NG[:, points], axis=1), 0) / np.diff(edges)
    top = float(per_neuron_NB.max()) or 1.0
    height_NB = 2 + (STRIP_HEIGHT - 2) * np.cbrt(per_neuron_NB / top)
    return [_bars(e, edges, heights) for e, heights in zip(layer.experts, height_NB, strict=True)]


def _bars(expert: Expert, edges: npt.NDArray[np.int64], heights: Floats) -> Strip:
    gone = expert.width - expert.kept
    scale = STRIP_WIDTH / expert.width
    paths: dict[bool, list[str]] = {True: [], False: []}
    for start, end, height in zip(edges[:-1], edges[1:], heights, strict=True):
        for low, high, removed in (
            (start, min(end, gone), True),
            (max(start, gone), end, False),
        ):
            if low < high:
                paths[removed].append(_bar(low * scale, (high - low) * scale, float(height)))
    return Strip("".join(paths[True]), "".join(paths[False]), _tone(expert))


def _flat(expert: Expert) -> Strip:
    """Where the method ranks no neurons, the strip says how many stayed."""
    split = STRIP_WIDTH * (1 - expert.share)
    removed = _bar(0, split, STRIP_HEIGHT / 2) if split else ""
    kept = _bar(split, STRIP_WIDTH - split, STRIP_HEIGHT / 2) if expert.kept else ""
    return Strip(removed, kept, _tone(expert))


def _tone(expert: Expert) -> str:
    return "merged" if expert.state == "merged" else "kept"


def _bar(x: float, width: float, height: float) -> str:
    gap = 0.6 if width > 2 else 0.0
    return f"M{x:.1f} {STRIP_HEIGHT}v-{height:.1f}h{width - gap:.1f}v{height:.1f}z"


@dataclass(frozen=True, slots=True)
class Tree:
    """A dendrogram over experts, and the experts in its order."""

    order: tuple[int, ...]
    path: str
    """In a box of width N (a leaf's middle at its place plus a half) and height 1."""
    clusters: tuple[tuple[int, ...], ...]
    """Alike experts: the tree cut into N / 2 parts, those of two and more."""


def tree(layer: Layer) -> Tree | None:
    """Average linkage; ``None`` where nothing says how alike experts are."""
    matrix_NN = layer.similarity_NN
    if matrix_NN is None or len(matrix_NN) < 2:
        return None
    distance_NN = matrix_NN if layer.measure == "distance" else 1.0 - matrix_NN
    distance_NN = np.clip((distance_NN + distance_NN.T) / 2, 0.0, None)
    np.fill_diagonal(distance_NN, 0.0)
    joined = linkage(squareform(distance_NN, checks=False), "average", optimal_ordering=True)
    drawn = dendrogram(joined, no_plot=True)
    top = float(joined[-1, 2]) or 1.0
    path = "".join(
        f"M{x[0] / 10:.2f} {1 - y[0] / top:.3f}V{1 - y[1] / top:.3f}"
        f"H{x[2] / 10:.2f}V{1 - y[3] / top:.3f}"
        for x, y in zip(drawn["icoord"], drawn["dcoord"], strict=True)
    )
    parts = fcluster(joined, max(2, len(matrix_NN) // 2), "maxclust")
    found: dict[int, list[int]] = {}
    for expert, part in enumerate(parts):
        found.setdefault(int(part), []).append(expert)
    clusters = tuple(tuple(members) for members in found.values() if len(members) > 1)
    return Tree(tuple(int(e) for e in drawn["leaves"]), path, clusters)


def groups(layer: Layer, drawn: Tree | None) -> tuple[tuple[int, ...], ...]:
    """Experts that share blocks; where none do, those that are alike."""
    merged = {tuple(sorted({e.index, *e.mates})) for e in layer.experts if e.mates}
    if merged:
        return tuple(sorted(merged))
    return drawn.clusters if drawn else ()


def likeness(layer: Layer, members: Sequence[int]) -> float | None:
    """Mean over a group's pairs."""
    if layer.similarity_NN is None or len(members) < 2:
        return None
    inside = layer.similarity_NN[np.ix_(members, members)]
    return float(inside[~np.eye(len(members), dtype=bool)].mean())


def heat(values_RC: Floats, *, low: float, high: float) -> str:
    """A PNG as a data address, one pixel a value, light for ``low`` and dark for ``high``."""
    level = np.clip((values_RC - low) / ((high - low) or 1.0), 0.0, 1.0)[..., None]
    rgb = np.where(
        level < 0.5,
        _LIGHT + (_MIDDLE - _LIGHT) * level * 2,
        _MIDDLE + (_DEEP - _MIDDLE) * (level * 2 - 1),
    )
    return _png(rgb.round().astype(np.uint8))


def _png(rgb: npt.NDArray[np.uint8]) -> str:
    rows, columns, _ = rgb.shape
    raw = b"".join(b"\0" + row.tobytes() for row in rgb)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How a layer's error grows as each of its experts loses the same share of neurons."""

    layer: int
    points: tuple[tuple[float, float], ...]
    """(share removed, error over the largest of all layers)."""
    errors: tuple[float, ...]
    """At a quarter, a half, three quarters and all removed."""
    line: str
    """The points as an SVG polyline in a box of 1 × 1, square root upwards."""
    end: float
    """Where that ends, from above."""
    label: float
    """Where its label stands, apart from the others'."""


def sensitivities(layers: Sequence[Layer]) -> list[Sensitivity]:
    """Of the layers whose method ranks neurons."""
    ranked = [layer for layer in layers if layer.removed_G]
    totals = {layer.index: layer.error_NG.sum(axis=0) for layer in ranked}
    top = max((float(t.max()) for t in totals.values()), default=1.0) or 1.0
    ends = [1 - max(float(t[-1]) / top, 0.0) ** 0.5 for t in totals.values()]
    found = []
    for layer, end, label in zip(ranked, ends, spread(ends, _LABEL), strict=True):
        share_G = np.array(layer.removed_G) / layer.experts[0].width
        error_G = totals[layer.index]
        points = tuple((float(s), float(e) / top) for s, e in zip(share_G, error_G, strict=True))
        line = " ".join(f"{s:.3f},{1 - max(e, 0.0) ** 0.5:.3f}" for s, e in points)
        errors = tuple(float(np.interp(s, share_G, error_G)) for s in (0.25, 0.5, 0.75, 1.0))
        found.append(Sensitivity(layer.index, points, errors, line, end, label))
    return found


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places from 0 to 1 moved apart by ``gap`` at least, in their order, and as little as need be.

    Where they don't fit they go on below 1.
    """
    order = sorted(range(len(places)), key=lambda n: places[n])
    moved = [places[n] for n in order]
    for n in range(1, len(moved)):
        moved[n] = max(moved[n], moved[n - 1] + gap)
    limit = max(1.0, gap * (len(moved) - 1))
    for n in reversed(range(len(moved))):
        moved[n] = min(moved[n], limit)
        limit = moved[n] - gap
    return [place for _, place in sorted(zip(order, moved, strict=True))]
