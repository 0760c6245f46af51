"""The fixed texts on which both engines are compared while a rollout goes on.

A set is known by its hash: evidence is about one set, and a file that changes meanwhile is another.
Texts go to the engines and nowhere else; records, metrics and logs have ids and domains.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Final

from moe_serve.calibration.texts import Texts, read_texts
from moe_serve.errors import UsageError
from moe_serve.rollout.policy import Probes

_LONGEST: Final = 8_000
"""Characters of a probe: it must not weigh like a user's long document."""
_MOST: Final = 2_000
"""Probes of a set: with more, a round takes days at a rate that users don't notice."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One text."""

    id: str
    """Of its content: first half of the SHA-256."""
    domain: str
    text: str


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """All probes of a rollout."""

    probes: tuple[Probe, ...]
    digest: str
    """SHA-256 over domains and texts, whatever their order."""

    @property
    def domains(self) -> dict[str, int]:
        """Domain → probes."""
        counts: dict[str, int] = {}
        for probe in self.probes:
            counts[probe.domain] = counts.get(probe.domain, 0) + 1
        return counts


def load_probes(settings: Probes) -> ProbeSet:
    """The set that ships with the package, a file's, or both, as a policy says.

    Raises:
        CalibrationError: the file can't be read.
        UsageError: it holds no probes, too many, too long ones, or one twice.
    """
    where = str(settings.texts or "probes")
    with resources.as_file(resources.files(__package__) / "probes.jsonl") as own:
        paths = [own] if settings.default else []
        if settings.texts is not None:
            paths.append(settings.texts)
        if not paths:
            raise UsageError("there are none", where=where, remedy="give texts or default = true")
        probes = _probes(read_texts(paths))
    if len(probes) > _MOST:
        raise UsageError(
            f"{len(probes)} probes; {_MOST} at most",
            where=where,
            remedy="leave some out: a set is asked whole, one text every few seconds",
        )
    keys = sorted(f"{probe.domain}\n{probe.id}" for probe in probes)
    return ProbeSet(probes, hashlib.sha256("\n".join(keys).encode()).hexdigest())


def _probes(texts: Texts) -> tuple[Probe, ...]:
    found: dict[str, Probe] = {}
    numbered = ((s, n, d) for s, several in texts.by_source() for n, d in enumerate(several, 1))
    for source, number, document in numbered:
        where = str(source.path)
        if len(document.text) > _LONGEST:
            raise UsageError(
                f"probe {number} has {len(document.text)} characters",
                where=where,
                remedy=f"cut it to {_LONGEST}",
            )
        identity = document.sha256[:32]
        if identity in found:
            raise UsageError(
                f"probe {number} is there twice, or in another file too",
                where=where,
                remedy="remove one",
            )
        found[identity] = Probe(identity, document.domain, document.text)
    return tuple(found.values())
