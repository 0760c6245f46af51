"""Who takes part: published rules as published, the same with our re-fit, and our own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from moe_serve.errors import UsageError
from moe_serve.pruning.methods.registry import AUTO, METHODS
from moe_serve.pruning.selection import Selection

Kind = Literal["expert peer", "neuron peer", "peer + re-fit", "ours"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contestant:
    """One row of the table."""

    label: str
    kind: Kind
    selection: Selection
    """Without a budget and a seed."""

    def at(self, keep: float, seed: int) -> Selection:
        """The request for one run."""
        return replace(self.selection, keep=keep, seed=seed)


def _peer(
    method: str,
    *,
    kind: Kind = "expert peer",
    suffix: str = "",
    across_layers: bool = True,
    drop_when_better: bool | None = None,
) -> Contestant:
    selection = Selection(
        method=method,
        refit=False,
        across_layers=across_layers,
        drop_when_better=drop_when_better,
    )
    return Contestant(label=method + suffix, kind=kind, selection=selection)


PEERS: Final = (
    _peer("drop-naee"),
    _peer("drop-reap"),
    _peer("drop-ean"),
    _peer("drop-man"),
    _peer("drop-msan"),
    _peer("drop-seer"),
    _peer("drop-frequency"),
    _peer("drop-taylor"),
    _peer("drop-fisher"),
    _peer("drop-aimer"),
    _peer("drop-random"),
    _peer("merge-msmoe"),
    _peer("merge-msmoe", suffix=", each layer", across_layers=False),
    _peer("merge-hc"),
    _peer("merge-ream"),
    # The paper merges whatever it groups; the choice is ours.
    _peer("merge-cka", suffix=", always merge", drop_when_better=False),
    _peer("merge-cka-weights"),
    _peer("block-heapr", kind="neuron peer"),
    _peer("block-taylor", kind="neuron peer"),
    _peer("block-magnitude", kind="neuron peer"),
)
"""Published rules, without compensation."""


def contestants(wanted: list[str], *, refits: bool) -> list[Contestant]:
    """The rows for some methods, peers first; every method that is no peer is ours.

    Args:
        wanted: method names; none for all.
        refits: whether each peer also runs with our re-fit.

    Raises:
        UsageError: a name is no method's.
    """
    known = [AUTO, *METHODS]
    if unknown := sorted(set(wanted) - set(known)):
        raise UsageError(
            f"no method {unknown[0]!r}", where="--methods", remedy="choose from " + ", ".join(known)
        )
    names = wanted or list(METHODS)
    found = [peer for peer in PEERS if peer.selection.method in names]
    if refits:
        found += [
            Contestant(
                label=f"{peer.label} + re-fit",
                kind="peer + re-fit",
                selection=replace(peer.selection, refit=True),
            )
            for peer in found
        ]
    published = {peer.label for peer in PEERS}
    return found + [
        Contestant(label=name, kind="ours", selection=Selection(method=name))
        for name in names
        if name not in published
    ]
