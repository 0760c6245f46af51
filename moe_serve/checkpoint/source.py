"""A checkpoint opened for reading: config, family, and tensors one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from moe_serve.checkpoint.ahead import ReadAhead, read_entry
from moe_serve.checkpoint.dtypes import TORCH_DTYPES
from moe_serve.checkpoint.finite import all_finite
from moe_serve.checkpoint.header import TensorEntry
from moe_serve.checkpoint.identity import fingerprint_of
from moe_serve.checkpoint.listing import list_tensors
from moe_serve.checkpoint.quantisation import (
    Matrix,
    Scheme,
    logical_name,
    quantisation_settings,
    scheme_of,
)
from moe_serve.checkpoint.substitution import (
    KEY,
    constant_name,
    parse_replaced,
    replaced_tables,
    retained,
)
from moe_serve.checkpoint.table import CompactTable, parse_table
from moe_serve.errors import CheckpointError, IncompleteCheckpoint, within
from moe_serve.families import Family, Projections, Shape, family_of
from moe_serve.files import MISMATCH, read_json

_CACHE_SCALES: Final = (".k_scale", ".v_scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """An opened checkpoint directory. Holds headers only; weights stay on disk.

    Peak memory: the headers, the tensor being read, and the layer being read ahead.
    """

    path: Path
    config: dict[str, Any]
    family: Family
    shape: Shape
    tensors: dict[str, TensorEntry]
    table: CompactTable
    """Empty for a stock checkpoint."""
    replaced: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Experts that are a constant, by layer: they are selected and store no block."""
    _read: list[int] = field(default_factory=lambda: [0])
    _fingerprint: list[str] = field(default_factory=list)
    _schemes: dict[str, Scheme] = field(default_factory=dict)
    _ahead: ReadAhead = field(default_factory=ReadAhead)

    @property
    def is_compact(self) -> bool:
        """Whether the router's ids have to be remapped to stored blocks."""
        return "compact_experts" in self.config

    @property
    def is_pruned(self) -> bool:
        """Whether it stores anything else than the original's experts."""
        return self.is_compact or KEY in self.config

    @property
    def bytes_read(self) -> int:
        """Weight bytes read through this object so far."""
        return self._read[0]

    @property
    def shards(self) -> tuple[Path, ...]:
        """The weight files, in order of name."""
        return tuple(sorted({entry.file for entry in self.tensors.values()}))

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor lies.

        Raises:
            IncompleteCheckpoint: no shard holds it.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise IncompleteCheckpoint(
                f"no shard holds tensor {name!r}",
                where=str(self.path),
                remedy=MISMATCH,
            ) from None

    def read_bytes(self, name: str) -> bytearray:
        """Read one tensor's bytes, unchanged."""
        entry = self.entry(name)
        data = self._ahead.take(name)
        if data is None:
            data = read_entry(entry)
        self._read[0] += entry.size
        return data

    def read_ahead(self, layer: int) -> None:
        """Begin to read a decoder layer in the background; nothing where there is none."""
        if 0 <= layer < self.shape.layers:
            self._ahead.begin(self.layer_tensors(layer))

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Read one tensor in its stored format.

        Args:
            name: the tensor.
            shape: what the config says it must be.

        Raises:
            CheckpointError: the stored shape contradicts ``shape``.
        """
        entry = self.entry(name)
        if shape is not None and entry.shape != shape:
            raise CheckpointError(
                f"tensor {name!r} is {list(entry.shape)}, the config says {list(shape)}",
                where=str(entry.file),
                remedy=MISMATCH,
            )
        dtype = TORCH_DTYPES[entry.dtype]
        if entry.size == 0:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(self.read_bytes(name), dtype=dtype).reshape(entry.shape)

    def scheme(self, name: str) -> Scheme:
        """How matrix ``name`` is stored. Its tensors may have other names.

        Raises:
            CheckpointError: in a way that can't be read, or not at all.
        """
        if name not in self._schemes:
            try:
                scheme = scheme_of(name, self.tensors, quantisation_settings(self.config))
            except CheckpointError as exc:
                where = f"{self.path}: {exc.where}" if exc.where else str(self.path)
                raise type(exc)(exc.what, where=where, remedy=exc.remedy) from None
            self._schemes[name] = scheme
        return self._schemes[name]

    def has(self, name: str) -> bool:
        """Whether matrix ``name`` is stored, as whatever."""
        try:
            self.scheme(name)
        except IncompleteCheckpoint:
            return False
        return True

    def stored(self, name: str) -> Matrix:
        """Read matrix ``name`` as it is stored.

        Raises:
            CheckpointError: a tensor whose values follow from the shape has others.
        """
        scheme = self.scheme(name)
        matrix = {ending: self.read(tensor) for ending, tensor in scheme.tensors(name).items()}
        if any(piece.derived for piece in scheme.pieces):
            for ending, expected in scheme.derive(*scheme.size(matrix)).items():
                if not torch.equal(matrix[ending], expected):
                    raise CheckpointError(
                        f"{ending} of {name!r} is not what its shape implies",
                        where=str(self.path),
                        remedy="fetch it again; columns ordered by activation can't be pruned",
                    )
        return matrix

    def weight(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """Matrix (or vector) ``name`` in FP32, whatever it is stored as.

        Args:
            name: as the family calls it.
            shape: what the config says it must be.

        Raises:
            CheckpointError: another shape, or a value is NaN or infinite.
        """
        scheme = self.scheme(name)
        weight = scheme.dequantise(self.stored(name))
        if shape is not None and tuple(weight.shape) != shape:
            raise CheckpointError(
                f"tensor {name!r} is {list(weight.shape)}, the config says {list(shape)}",
                where=str(self.path),
                remedy=MISMATCH,
            )
        if not all_finite(weight):
            raise CheckpointError(
                f"tensor {name!r} holds NaN or infinite values",
                where=str(self.entry(next(iter(scheme.tensors(name).values()))).file),
                remedy="the file is damaged or the model diverged in training; fetch it again",
            )
        return weight

    def block_names(self, layer: int, block: int) -> Projections:
        """The matrices of a stored block.

        Blocks are numbered from 0; where experts are replaced by constants, as in the original.
        """
        if ids := self.replaced.get(layer):
            block = retained(ids, self.shape.experts)[block]
        return self.family.expert_names(layer, block)

    def expert_scheme(self, layer: int) -> tuple[Scheme, Scheme, Scheme]:
        """How the gate, up and down matrices of a layer's experts are stored."""
        gate, up, down = (self.scheme(n) for n in self.block_names(layer, 0))
        return gate, up, down

    def layer_tensors(self, layer: int) -> list[TensorEntry]:
        """All tensors of one decoder layer, in stored order."""
        prefix = self.family.layer_prefix(layer)
        found = [e for e in self.tensors.values() if e.name.startswith(prefix)]
        return sorted(found, key=lambda e: (e.file, e.start))

    def layer_matrices(self, layer: int) -> list[str]:
        """All matrices and vectors of one decoder layer, in stored order.

        Scales of a quantised key-value cache are not among them: they change no weight.
        """
        names = (e.name for e in self.layer_tensors(layer))
        return list(dict.fromkeys(logical_name(n) for n in names if not n.endswith(_CACHE_SCALES)))

    def expert_bytes(self) -> dict[int, int]:
        """Bytes of the routed experts of every mixture layer, by layer index."""
        sizes = {}
        for layer in self.family.moe_layers(self.config):
            prefix = self.family.expert_prefix(layer)
            sizes[layer] = sum(
                e.size for e in self.layer_tensors(layer) if e.name.startswith(prefix)
            )
        return sizes

    def prediction_layers(self) -> dict[int, int]:
        """Bytes of the layers for multi-token prediction that the files hold, by layer index."""
        sizes = {
            layer: sum(e.size for e in self.tensors.values() if e.name.startswith(prefix))
            for layer, prefix in enumerate(
                self.family.extra_prefixes(self.config), self.shape.layers
            )
        }
        return {layer: size for layer, size in sizes.items() if size}

    def fingerprint(self) -> str:
        """Which checkpoint this is; fine-tunes of one model differ (:func:`fingerprint_of`)."""
        # Record, statistics and plan each ask in a run, and a file may hold thousands of tensors.
        if not self._fingerprint:
            self._fingerprint.append(fingerprint_of(self.config, self.tensors.values()))
        return self._fingerprint[0]

    def freshness(self) -> dict[str, list[int]]:
        """Size and modification time of each shard: a change between resumes shows."""
        return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in self.shards}


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a directory and check that its files agree with one another.

    Raises:
        CheckpointError: the files are not what config, index or headers say.
    """
    if not path.is_dir():
        raise CheckpointError(
            "is not a directory",
            where=str(path),
            remedy="give the folder that holds config.json and the safetensors files",
        )
    with within(path):
        return _opened(path)


def _opened(path: Path) -> Checkpoint:
    config = read_json(path / "config.json")
    family = family_of(config)
    shape = family.shape(config)
    family.routing_of(config)  # Refuses a rule that can't hold.
    tensors = list_tensors(path)
    table = parse_table(config, family, where=str(path / "config.json"))
    replaced = parse_replaced(config, family, where=str(path / "config.json"))
    checkpoint = Checkpoint(
        path=path,
        config=config,
        family=family,
        shape=shape,
        tensors=tensors,
        table=replaced_tables(replaced, shape) if replaced else table,
        replaced=replaced,
    )
    _check_layers(checkpoint)
    _check_experts(checkpoint)
    _check_shared(checkpoint)
    return checkpoint


def _check_layers(checkpoint: Checkpoint) -> None:
    """No tensor belongs to a layer that the config knows nothing of."""
    family, layers = checkpoint.family, checkpoint.shape.layers
    known = tuple(map(family.layer_prefix, range(layers)))
    known += family.extra_prefixes(checkpoint.config)
    beyond = family.layer_prefix(0).removesuffix("0.")
    for name in checkpoint.tensors:
        if name.startswith(beyond) and not name.startswith(known):
            key = family.extra_layers_key
            raise CheckpointError(
                f"tensor {name!r} belongs to a layer beyond the {layers} in the config"
                + (f" and the {key} for prediction" if key else ""),
                where=str(checkpoint.path),
                remedy=MISMATCH,
            )


def _check_experts(checkpoint: Checkpoint) -> None:
    """Config, table and tensors agree on how many experts there are and how wide they are."""
    family, shape = checkpoint.family, checkpoint.shape
    for layer in family.moe_layers(checkpoint.config):
        entry = checkpoint.entry(family.gate_name(layer))
        if entry.shape != (shape.experts, shape.hidden):
            raise CheckpointError(
                f"router {entry.name!r} is {list(entry.shape)}, the config says "
                f"{shape.experts} experts of hidden size {shape.hidden}",
                where=str(checkpoint.path),
                remedy=MISMATCH,
            )
        compact = checkpoint.table.layers.get(layer)
        count = compact.blocks if compact else shape.experts
        width = compact.width if compact else shape.width
        wide, tall = (width, shape.hidden), (shape.hidden, width)
        schemes = checkpoint.expert_scheme(layer)
        expected: set[str] = set()
        for expert in range(count):
            names = checkpoint.block_names(layer, expert)
            for name, scheme, form in zip(names, schemes, (wide, wide, tall), strict=True):
                pieces = scheme.tensors(name)
                expected.update(pieces.values())
                if checkpoint.scheme(name) != scheme:
                    raise CheckpointError(
                        f"is stored as {checkpoint.scheme(name).name}, "
                        f"expert 0 of its layer as {scheme.name}",
                        where=f"{checkpoint.path}: {name}",
                        remedy="give a checkpoint whose layers have one number format each",
                    )
                for ending, stored in scheme.shapes(*form).items():
                    entry = checkpoint.entry(pieces[ending])
                    if entry.shape != stored:
                        raise CheckpointError(
                            f"tensor {entry.name!r} is {list(entry.shape)}, "
                            f"expected {list(stored)}",
                            where=str(checkpoint.path),
                            remedy=MISMATCH,
                        )
        expected |= _checked_constants(checkpoint, layer)
        prefix = family.expert_prefix(layer)
        present = {n for n in checkpoint.tensors if n.startswith(prefix)}
        if surplus := sorted(present - expected):
            raise CheckpointError(
                f"layer {layer} holds expert tensors beyond the {count} it should, "
                f"first {surplus[0]!r}",
                where=str(checkpoint.path),
                remedy="remove a stale shard, or give another quantisation: this one is not read",
            )


def _checked_constants(checkpoint: Checkpoint, layer: int) -> set[str]:
    """Names of a layer's constants: a vector for each expert that is replaced."""
    names = set()
    for expert in checkpoint.replaced.get(layer, ()):
        entry = checkpoint.entry(constant_name(checkpoint.family, layer, expert))
        if entry.shape != (checkpoint.shape.hidden,):
            raise CheckpointError(
                f"constant {entry.name!r} is {list(entry.shape)}, expected "
                f"{[checkpoint.shape.hidden]}",
                where=str(checkpoint.path),
                remedy=MISMATCH,
            )
        names.add(entry.name)
    return names


def _check_shared(checkpoint: Checkpoint) -> None:
    """The shared experts are as wide as the config says, where it says it."""
    family, shape = checkpoint.family, checkpoint.shape
    count = family.shared_count(checkpoint.config, shape.width) or 0
    for layer in family.moe_layers(checkpoint.config) if count else ():
        names = family.shared_names(layer)
        if names is None:
            continue
        scheme, width = checkpoint.scheme(names.gate), count * shape.width
        for ending, stored in scheme.shapes(width, shape.hidden).items():
            entry = checkpoint.entry(scheme.tensors(names.gate)[ending])
            if entry.shape != stored:
                raise CheckpointError(
                    f"tensor {entry.name!r} is {list(entry.shape)}, {family.shared_count_key} = "
                    f"{checkpoint.config[family.shared_count_key or '']} makes {list(stored)}",
                    where=str(checkpoint.path),
                    remedy=MISMATCH,
                )
