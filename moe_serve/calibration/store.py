"""``statistics.safetensors`` and ``statistics.json``: written layer by layer, read likewise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from moe_serve.calibration.balance import quotas
from moe_serve.calibration.gradients import GRADIENT_TOKENS, LayerGradients
from moe_serve.calibration.passages import Known
from moe_serve.calibration.sequences import Sequences
from moe_serve.calibration.share import WHOLE, Share
from moe_serve.calibration.statistics import LayerStatistics
from moe_serve.calibration.texts import Source
from moe_serve.calibration.traffic import Counts, as_in_traffic
from moe_serve.checkpoint.chain import CHAIN, broken, chained, seal
from moe_serve.checkpoint.dtypes import TORCH_DTYPES
from moe_serve.checkpoint.finite import all_finite
from moe_serve.checkpoint.hashing import file_sha256
from moe_serve.checkpoint.header import TensorEntry, read_header
from moe_serve.checkpoint.shards import ShardWriter, TensorSpec
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.errors import CalibrationError
from moe_serve.files import read_json, reading, write_json

TENSORS: Final = "statistics.safetensors"
RECORD: Final = "statistics.json"
VERSION: Final = 3
_GRADIENTS: Final = "gradients."


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRecord:
    """What was observed, with what: enough to repeat it, without a word of the texts."""

    model: str
    """Path of the checkpoint, as given."""
    fingerprint: str
    """:meth:`Checkpoint.fingerprint` of it."""
    domains: tuple[str, ...]
    """In the order of the statistics' C axis."""
    tokens: dict[str, int]
    """Domain → tokens observed."""
    tokens_sha256: str
    """Of the token ids."""
    sources: tuple[dict[str, Any], ...]
    """Files with hashes, licences and terms."""
    seed: int
    """Of the choice of texts and tokens."""
    reservoir: int
    """Tokens of which whole vectors are kept, per layer."""
    share: Share = WHOLE
    """The part of the texts that was observed; the other fields describe the whole."""
    gradients: int = GRADIENT_TOKENS
    """Tokens of which the reverse pass is taken at most; 0: it is not."""
    balance: tuple[float, ...] = ()
    """Each domain's part of the weight; empty where all weigh the same."""
    sample: tuple[int, ...] = ()
    """With a balance: the reservoir's tokens from each domain."""
    traffic: Counts | None = None
    """How often production selected each expert; ``None`` where the texts alone count."""
    passages: Known | None = None
    """Hashes of what was read, to find overlaps by."""
    purpose: str | None = None
    """What the run was said to be for."""

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        sequences: Sequences,
        sources: tuple[Source, ...],
        *,
        seed: int,
        reservoir: int,
        share: Share = WHOLE,
    ) -> CalibrationRecord:
        """Describe a run."""
        tokens = sequences.tokens_by_domain()
        balance = sequences.balance
        sample = quotas(balance, tuple(tokens.values()), reservoir) if balance else ()
        return cls(
            model=str(checkpoint.path),
            fingerprint=checkpoint.fingerprint(),
            domains=sequences.domains,
            tokens=tokens,
            tokens_sha256=sequences.sha256(),
            sources=tuple(s.to_json() for s in sources),
            seed=seed,
            reservoir=sum(sample) if sample else min(reservoir, sequences.total),
            share=share,
            balance=balance,
            sample=sample,
        )

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return {
            "version": VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "domains": list(self.domains),
            "tokens": self.tokens,
            "tokens_sha256": self.tokens_sha256,
            "sources": list(self.sources),
            "seed": self.seed,
            "reservoir": self.reservoir,
        } | self._exceptions()

    def _exceptions(self) -> dict[str, Any]:
        found: dict[str, Any] = {"shard": str(self.share)} if self.share.of > 1 else {}
        if self.balance:
            found["balance"] = dict(zip(self.domains, self.balance, strict=True))
        if self.traffic:
            found["traffic"] = {str(layer): list(n) for layer, n in self.traffic.items()}
        if self.passages:
            found["passages"] = self.passages.to_json()
        if self.purpose:
            found["purpose"] = self.purpose
        if self.gradients != GRADIENT_TOKENS:
            found["gradients"] = self.gradients
        return found


class StatisticsWriter:
    """Layers written in place; what is there survives a kill."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, record: CalibrationRecord) -> None:
        """Reserve the file."""
        self.folder = folder
        shape = checkpoint.shape
        shapes = LayerStatistics.shapes(
            domains=len(record.domains),
            experts=shape.experts,
            width=shape.width,
            hidden=shape.hidden,
            reservoir=record.reservoir,
        )
        gradients = LayerGradients.shapes(
            experts=shape.experts, width=shape.width, hidden=shape.hidden
        )
        if record.gradients:
            shapes |= {_GRADIENTS + field: form for field, form in gradients.items()}
        runs = [
            tuple(
                TensorSpec(name=_name(layer, field), dtype=dtype, shape=form)
                for field, (dtype, form) in shapes.items()
            )
            for layer in checkpoint.family.moe_layers(checkpoint.config)
        ]
        self._shards = ShardWriter(folder, runs, file=TENSORS)
        self._record = record

    def write(self, layer: int, statistics: LayerStatistics) -> None:
        """Store one layer and bring it to the disk."""
        for field, tensor in statistics.tensors().items():
            self._shards.write(_name(layer, field), tensor)
        self._shards.sync()

    def write_gradients(self, layer: int, gradients: LayerGradients) -> None:
        """Store what the reverse pass found for one layer."""
        for field, tensor in gradients.tensors().items():
            self._shards.write(_name(layer, _GRADIENTS + field), tensor)
        self._shards.sync()

    def close(self) -> str:
        """Write the record; return the SHA-256 of the statistics."""
        digest = file_sha256(self.folder / TENSORS)
        write_json(self.folder / RECORD, chained(self._record.to_json() | {"sha256": digest}))
        return digest


class Statistics:
    """A finished statistics folder, read one layer at a time."""

    def __init__(self, folder: Path) -> None:
        """Open it.

        Raises:
            CalibrationError: it is not a finished folder of this version.
        """
        if not (folder / RECORD).exists():
            raise CalibrationError(
                f"holds no {RECORD}",
                where=str(folder),
                remedy="give the folder that moe-serve calibrate made, finished",
            )
        record = read_json(folder / RECORD)
        if record.get("version") != VERSION:
            raise CalibrationError(
                "was made by another version",
                where=str(folder / RECORD),
                remedy="calibrate again",
            )
        self.folder = folder
        self.edited = broken(record, RECORD)
        """What its chain of hashes says was changed by hand."""
        self.seal = seal(record)
        """The last link of that; stands for the whole record."""
        self.record = {key: value for key, value in record.items() if key != CHAIN}
        self.sha256: str = record["sha256"]
        self._entries = {e.name: e for e in read_header(folder / TENSORS)}

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names, in the order of the C axis."""
        return tuple(self.record["domains"])

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse statistics of another checkpoint, and a part of one's.

        Raises:
            CalibrationError: the fingerprints differ, or these are one shard of several.
        """
        if "shard" in self.record:
            raise CalibrationError(
                f"are shard {self.record['shard']} of a calibration",
                where=str(self.folder),
                remedy="add all its shards up with moe-serve merge-statistics",
            )
        if self.record["fingerprint"] != checkpoint.fingerprint():
            raise CalibrationError(
                f"were gathered on another checkpoint than {checkpoint.path}",
                where=str(self.folder),
                remedy="calibrate this one",
            )

    @property
    def has_gradients(self) -> bool:
        """Whether the reverse pass was taken."""
        return bool(self.record.get("gradients", GRADIENT_TOKENS))

    @property
    def balance(self) -> dict[str, float] | None:
        """Each domain's part of the weight; ``None`` where all weigh the same."""
        found: dict[str, float] | None = self.record.get("balance")
        return found

    @property
    def weights_sha256(self) -> str | None:
        """Identifies what the sums are weighed by when they are read: balance and traffic."""
        return seal(chained({key: self.record.get(key) for key in ("balance", "traffic")}))

    def layer(self, layer: int) -> LayerStatistics:
        """Read one layer, its sums per domain as the balance weighs them. Memory: N matrices."""
        fields = LayerStatistics.__slots__
        found = LayerStatistics.from_tensors(
            {field: self._read(_name(layer, field)) for field in fields}
        )
        if self.balance is not None:
            tokens = self.record["tokens"]
            whole = sum(tokens.values())
            omega_C = [whole * self.balance[name] / tokens[name] for name in self.domains]
            found = found.weighted(omega_C)
        if (seen := self._traffic(layer)) is not None:
            found = as_in_traffic(found, found.count_CN.sum(dim=0), seen)
        return found

    def small(self, layer: int, fields: Sequence[str]) -> dict[str, torch.Tensor]:
        """Some of a layer's sums, as they were added up: unweighted, whatever the balance."""
        return {field: self._read(_name(layer, field)) for field in fields}

    def gradients(self, layer: int) -> LayerGradients:
        """Read one layer's part from the reverse pass."""
        fields = LayerGradients.__slots__
        found = LayerGradients(
            **{field: self._read(_name(layer, _GRADIENTS + field)) for field in fields}
        )
        seen = self._traffic(layer)
        return found if seen is None else as_in_traffic(found, found.reached_N, seen)

    def _traffic(self, layer: int) -> torch.Tensor | None:
        counts = self.record.get("traffic")
        return None if counts is None else torch.tensor(counts[str(layer)])

    def _read(self, name: str) -> torch.Tensor:
        entry = self._entry(name)
        buffer = bytearray(entry.size)
        with reading(entry.file), entry.file.open("rb") as file:
            file.seek(entry.start)
            file.readinto(buffer)
        tensor = torch.frombuffer(buffer, dtype=TORCH_DTYPES[entry.dtype]).reshape(entry.shape)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CalibrationError(
                f"{name} holds NaN or infinite values",
                where=str(entry.file),
                remedy="calibrate again; if it stays, the model's activations overflow",
            )
        return tensor

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise CalibrationError(
                f"lack {name}", where=str(self.folder / TENSORS), remedy="calibrate again"
            )
        return self._entries[name]


def _name(layer: int, field: str) -> str:
    return f"layers.{layer}.{field}"
