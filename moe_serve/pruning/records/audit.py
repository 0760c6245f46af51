"""What a checkpoint's record says about its texts, and whether it is still true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final

from moe_serve.calibration.governance import undeclared
from moe_serve.calibration.texts import read_texts
from moe_serve.checkpoint.hashing import file_sha256
from moe_serve.checkpoint.manifest import MANIFEST, Manifest, hash_files
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.progress import Progress
from moe_serve.pruning.plan import Plan

_PLAN: Final = "plan.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """The record, what was recomputed, and what is missing or changed."""

    folder: Path
    manifest: Manifest
    checked: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is missing or changed."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """For ``--json``: the record without the hashes of passages, which say nothing to read."""
        record = self.manifest
        return {
            "checkpoint": str(self.folder),
            "original": record.original.model_dump(),
            "method": record.method,
            "seed": record.seed,
            "plan_sha256": record.plan_sha256,
            "statistics_sha256": record.statistics_sha256,
            "purpose": (record.calibration or {}).get("purpose"),
            "tokens": (record.calibration or {}).get("tokens", {}),
            "tokens_sha256": (record.calibration or {}).get("tokens_sha256"),
            "sources": record.sources(),
            "passed": self.passed,
            "checked": list(self.checked),
            "problems": list(self.problems),
        }


def audit(
    folder: Path,
    progress: Progress,
    *,
    original: Path | None = None,
    texts: Sequence[Path] = (),
    today: date | None = None,
) -> Audit:
    """Recompute every hash that can be: of the checkpoint, and of what is given beside it.

    Args:
        folder: a checkpoint written by this program.
        progress: told about files.
        original: what it was made from.
        texts: where its calibration texts are now.
        today: by default today (UTC).

    Raises:
        MoeServeError: there is no record, or what was given can't be read.
    """
    manifest = Manifest.load(folder)
    results = [
        (f"SHA-256 of {len(manifest.files)} files", _files(folder, manifest, progress)),
        (f"{_PLAN} is the plan in {MANIFEST}", _plan(folder, manifest)),
        ("every text has terms that hold today", _terms(manifest, today)),
    ]
    if original is not None:
        what = "the original is the one that was pruned"
        results.append((what, _original(original, manifest)))
    if texts:
        what = f"{len(manifest.sources())} texts are those that were read"
        results.append((what, _texts(texts, manifest)))
    return Audit(
        folder=folder,
        manifest=manifest,
        checked=tuple(what for what, found in results if not found),
        problems=tuple(problem for _, found in results for problem in found),
    )


def _files(folder: Path, manifest: Manifest, progress: Progress) -> list[str]:
    present = hash_files(folder, progress, "hash")
    return _differences(manifest.files, present, MANIFEST) + [
        f"{name} is not in {MANIFEST}" for name in sorted(present.keys() - manifest.files)
    ]


def _differences(recorded: dict[str, str], present: dict[str, str], where: str) -> list[str]:
    return [
        f"{name} is missing"
        if name not in present
        else f"{name} differs from its SHA-256 in {where}"
        for name, digest in recorded.items()
        if present.get(name) != digest
    ]


def _plan(folder: Path, manifest: Manifest) -> list[str]:
    if not (folder / _PLAN).exists():
        return [f"{_PLAN} is missing"]
    plan, found = Plan.load(folder / _PLAN), []
    if plan.sha256() != manifest.plan_sha256:
        found.append(f"{_PLAN} is not the plan in {MANIFEST}")
    if plan.statistics_sha256 != manifest.statistics_sha256:
        found.append(f"{_PLAN} was made from other statistics than {MANIFEST} says")
    return found


def _terms(manifest: Manifest, today: date | None) -> list[str]:
    if manifest.calibration is None and manifest.statistics_sha256 is not None:
        sha256 = manifest.statistics_sha256
        remedy = "prune with --statistics FOLDER beside --plan"
        return [f"the texts behind statistics {sha256} are not on record; {remedy}"]
    now = today or datetime.now(UTC).date()
    found = [f"{name}: nobody declared its terms" for name in undeclared(manifest.sources())]
    for source in manifest.sources():
        until = (source.get("declaration") or {}).get("retain_until")
        if until and date.fromisoformat(until) < now:
            found.append(f"{source['name']}: was to be kept until {until}; see that it is deleted")
    return found


def _original(original: Path, manifest: Manifest) -> list[str]:
    checkpoint = open_checkpoint(original)
    files = {path.name: path for path in (original / "config.json", *checkpoint.shards)}
    recorded = {"config.json": manifest.original.config_sha256} | manifest.original.weights
    present = {name: file_sha256(path) for name, path in files.items()}
    return [f"original: {line}" for line in _differences(recorded, present, MANIFEST)]


def _texts(paths: Sequence[Path], manifest: Manifest) -> list[str]:
    given = {source.sha256: source.name for source in read_texts(paths).sources}
    names = set(given.values())
    recorded = manifest.sources()
    missing = [source for source in recorded if source["sha256"] not in given]
    return [
        f"text {source['name']} differs from its SHA-256 in {MANIFEST}"
        if source["name"] in names
        else f"text {source['name']} is missing"
        for source in missing
    ]
