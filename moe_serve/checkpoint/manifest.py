"""``moe_serve.json``: what a checkpoint was made from and how, with a hash of every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_serve.checkpoint.chain import CHAIN, chained
from moe_serve.checkpoint.hashing import file_sha256
from moe_serve.errors import CheckpointError
from moe_serve.files import read_json, write_json
from moe_serve.progress import Progress

MANIFEST: Final = "moe_serve.json"
_R = TypeVar("_R", bound=BaseModel)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Original(_Model):
    """The checkpoint that was pruned."""

    name: str
    """Of its directory."""
    config_sha256: str
    """Of its ``config.json``."""
    weights: dict[str, str]
    """Shard name → SHA-256."""


class ExpertBytes(_Model):
    """Bytes of all routed experts."""

    original: int
    """Before."""
    kept: int
    """After."""


class LayerCounts(_Model):
    """What one changed layer stores."""

    width: int
    """Neurons per block."""
    blocks: int
    """Stored blocks."""
    dropped: int
    """Experts that the router never selects."""
    replaced: int = 0
    """Experts that are a constant."""


class PredictionLayers(_Model):
    """The original's layers for multi-token prediction."""

    layers: tuple[int, ...]
    """Their numbers."""
    bytes: int
    """Of all of them."""
    kept: bool
    """They draft for the original, so they go where anything else changes."""


class Manifest(_Model):
    """The file's content. Equal inputs and seed give equal bytes: it holds no date."""

    schema_version: Literal[1] = 1
    """Of this file."""
    moe_serve_version: str
    """That wrote it."""
    format: str
    """``compact``, ``tied``, ``native`` or ``substitution``."""
    original: Original
    method: str
    """Name of the rule that chose."""
    settings: dict[str, Any]
    """The method's, as they were in force."""
    seed: int
    """Of all that was drawn."""
    plan_sha256: str
    """Of the plan's content."""
    statistics_sha256: str | None
    """Of the statistics; ``null``: chosen from the weights alone."""
    calibration: dict[str, Any] | None
    """Sources with licences and hashes, token counts; never a text."""
    refit: dict[str, Any] | None
    """Per layer: squared output error before and after, λ where the closed form had the last word;
    with healing, held-out errors by epoch, of the last layer in nats."""
    expert_bytes: ExpertBytes
    numbers: dict[str, Any] | None = None
    """Quantised experts: schemes, tile, and how many blocks of each projection were copied byte
    for byte or rounded again."""
    layers: dict[int, LayerCounts]
    """Layer → what it stores."""
    prediction_layers: PredictionLayers | None = None
    """``None``: the original's files hold none."""
    quality: dict[str, Any] | None = None
    """Measured, if it was."""
    files: dict[str, str] = {}
    """File name → SHA-256 of every file of the checkpoint but this one."""
    chain: dict[str, str] = {}
    """Field → hash of it and of all before it (:mod:`moe_serve.checkpoint.chain`)."""

    def sources(self) -> list[dict[str, Any]]:
        """All text files that calibration read, those behind reused statistics included."""
        own = self.calibration or {}
        found = [*own.get("sources", ()), *own.get("statistics", {}).get("sources", ())]
        return [s for i, s in enumerate(found) if s not in found[:i]]

    def save(self, target: Path, progress: Progress) -> Manifest:
        """Hash the directory's files and write the manifest last."""
        hashed = self.model_copy(update={"files": hash_files(target, progress, "hash output")})
        content = chained(hashed.model_dump(mode="json"))
        write_json(target / MANIFEST, content)
        return hashed.model_copy(update={CHAIN: content[CHAIN]})

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read it.

        Raises:
            CheckpointError: it is absent or malformed.
        """
        remedy = "only checkpoints written by moe-serve have one"
        return load_record(cls, folder, MANIFEST, remedy)


def load_record(kind: type[_R], folder: Path, name: str, remedy: str) -> _R:
    """Read a JSON file that a checkpoint carries.

    Args:
        kind: its model.
        folder: the checkpoint.
        name: of the file.
        remedy: what to do where there is none.

    Raises:
        CheckpointError: it is absent or malformed.
    """
    path = folder / name
    if not path.exists():
        raise CheckpointError(f"holds no {name}", where=str(folder), remedy=remedy)
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as exc:
        first = exc.errors()[0]
        raise CheckpointError(
            f"is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']})",
            where=str(path),
            remedy="restore it or prune again",
        ) from exc


def hash_files(folder: Path, progress: Progress, task: str) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint directory but the manifest."""
    names = sorted(
        p.name
        for p in folder.iterdir()
        if p.is_file() and p.name != MANIFEST and not p.name.startswith(".")
    )
    progress.start(task, len(names))
    hashes = {}
    for name in names:
        hashes[name] = file_sha256(folder / name)
        progress.advance()
    return hashes
