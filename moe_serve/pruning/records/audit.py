"""What the record of a checkpoint or of statistics says, and whether it is still true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final

from moe_serve.calibration.governance import undeclared
from moe_serve.calibration.store import RECORD, TENSORS, Statistics
from moe_serve.calibration.texts import read_texts
from moe_serve.checkpoint.chain import broken, seal
from moe_serve.checkpoint.hashing import file_sha256
from moe_serve.checkpoint.manifest import MANIFEST, Manifest, hash_files
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.files import read_json
from moe_serve.progress import Progress
from moe_serve.pruning.plan import Plan

_PLAN: Final = "plan.json"
_TERMS: Final = "every text has terms that hold today"


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """The record, what was recomputed, and what is missing or changed."""

    folder: Path
    kind: str
    """``checkpoint`` or ``statistics``."""
    record: dict[str, Any]
    """What it was made of and how, without the hashes of passages, which say nothing to read."""
    sources: list[dict[str, Any]]
    """Texts, with their owners' terms."""
    seal: str | None
    """Last link of the record's chain of hashes: noted elsewhere, it proves the whole record."""
    checked: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is missing or changed."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            self.kind: str(self.folder),
            **self.record,
            "sources": self.sources,
            "seal": self.seal,
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
    """Recompute every hash that can be: of a folder, and of what is given beside it.

    Args:
        folder: a checkpoint or statistics written by this program.
        progress: told about files.
        original: what it was made from.
        texts: where its calibration texts are now.
        today: by default today (UTC).

    Raises:
        MoeServeError: there is no record, or what was given can't be read.
    """
    if (folder / RECORD).exists() and not (folder / MANIFEST).exists():
        return _of_statistics(folder, progress, original, texts, today)
    manifest = Manifest.load(folder)
    content = read_json(folder / MANIFEST)
    calibration = manifest.calibration or {}
    recorded = {"config.json": manifest.original.config_sha256} | manifest.original.weights
    results = [
        (f"{MANIFEST} is as it was written", broken(content, MANIFEST)),
        (f"SHA-256 of {len(manifest.files)} files", _files(folder, manifest, progress)),
        (f"{_PLAN} is the plan in {MANIFEST}", _plan(folder, manifest)),
        (_TERMS, _unknown(manifest) or _terms(manifest.sources(), today)),
    ]
    if original is not None:
        what = "the original is the one that was pruned"
        results.append((what, _original(original, recorded)))
    if texts:
        results.append(_texts(texts, manifest.sources(), MANIFEST))
    record = {
        "original": manifest.original.model_dump(),
        "method": manifest.method,
        "seed": manifest.seed,
        "plan_sha256": manifest.plan_sha256,
        "statistics_sha256": manifest.statistics_sha256,
        "purpose": calibration.get("purpose"),
        "tokens": calibration.get("tokens", {}),
        "tokens_sha256": calibration.get("tokens_sha256"),
    }
    return _found(folder, "checkpoint", record, manifest.sources(), seal(content), results)


def _of_statistics(
    folder: Path,
    progress: Progress,
    original: Path | None,
    texts: Sequence[Path],
    today: date | None,
) -> Audit:
    statistics = Statistics(folder)
    record = statistics.record
    progress.start("hash", 1)
    same = file_sha256(folder / TENSORS) == statistics.sha256
    progress.advance()
    results = [
        (f"{RECORD} is as it was written", statistics.edited),
        (f"SHA-256 of {TENSORS}", [] if same else [f"{TENSORS} differs from its SHA-256"]),
        (_TERMS, _terms(record["sources"], today)),
    ]
    if original is not None:
        same = open_checkpoint(original).fingerprint() == record["fingerprint"]
        wrong = "original: its configuration and tensors are other ones than those observed"
        results.append(("the original has the fingerprint on record", [] if same else [wrong]))
    if texts:
        results.append(_texts(texts, record["sources"], RECORD))
    shown = {
        "model": record["model"],
        "fingerprint": record["fingerprint"],
        "seed": record["seed"],
        "statistics_sha256": statistics.sha256,
        "shard": record.get("shard"),
        "purpose": record.get("purpose"),
        "tokens": record["tokens"],
        "tokens_sha256": record["tokens_sha256"],
    }
    return _found(folder, "statistics", shown, record["sources"], statistics.seal, results)


def _found(
    folder: Path,
    kind: str,
    record: dict[str, Any],
    sources: list[dict[str, Any]],
    last: str | None,
    results: list[tuple[str, list[str]]],
) -> Audit:
    return Audit(
        folder=folder,
        kind=kind,
        record=record,
        sources=sources,
        seal=last,
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


def _unknown(manifest: Manifest) -> list[str]:
    if manifest.calibration is not None or manifest.statistics_sha256 is None:
        return []
    remedy = "prune with --statistics FOLDER beside --plan"
    return [f"the texts behind statistics {manifest.statistics_sha256} are not on record; {remedy}"]


def _terms(sources: list[dict[str, Any]], today: date | None) -> list[str]:
    now = today or datetime.now(UTC).date()
    found = [f"{name}: nobody declared its terms" for name in undeclared(sources)]
    for source in sources:
        until = (source.get("declaration") or {}).get("retain_until")
        if until and date.fromisoformat(until) < now:
            found.append(f"{source['name']}: was to be kept until {until}; see that it is deleted")
    return found


def _original(original: Path, recorded: dict[str, str]) -> list[str]:
    checkpoint = open_checkpoint(original)
    files = {path.name: path for path in (original / "config.json", *checkpoint.shards)}
    present = {name: file_sha256(path) for name, path in files.items()}
    return [f"original: {line}" for line in _differences(recorded, present, MANIFEST)]


def _texts(
    paths: Sequence[Path], recorded: list[dict[str, Any]], where: str
) -> tuple[str, list[str]]:
    given = {source.sha256: source.name for source in read_texts(paths).sources}
    names = set(given.values())
    missing = [source for source in recorded if source["sha256"] not in given]
    return f"{len(recorded)} texts are those that were read", [
        f"text {source['name']} differs from its SHA-256 in {where}"
        if source["name"] in names
        else f"text {source['name']} is missing"
        for source in missing
    ]
