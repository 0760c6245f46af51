"""An output being written: its tensors, and how layers become bytes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from moe_serve.checkpoint.dtypes import TORCH_DTYPES
from moe_serve.checkpoint.layout import (
    EMBEDDING,
    HEAD,
    Stored,
    constant_dtype,
    copied_entries,
    needs_head,
    runs,
)
from moe_serve.checkpoint.quantisation import (
    COLUMNS,
    ROWS,
    InexactJoin,
    Matrix,
    logical_name,
)
from moe_serve.checkpoint.shards import Run, ShardWriter, TensorSpec
from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.substitution import constant_name
from moe_serve.errors import PlanError

ROUTER_MASK: Final = "router_mask.safetensors"
_SILENCE: Final = -1e30
"""A correction bias under which no expert is selected; finite in BF16 and FP32. F16 takes the least
number that it has, which is far below any score too."""


class LayerBlocks(NamedTuple):
    """One layer's stored blocks in the checkpoint's number format."""

    gate: Sequence[Matrix]
    """[b, D] each."""
    up: Sequence[Matrix]
    """[b, D] each."""
    down: Sequence[Matrix]
    """[D, b] each."""
    constants_RD: torch.Tensor | None = None
    """Output of each expert that is replaced by a constant, ids ascending; ``None``: zero."""

    @property
    def matrices(self) -> tuple[Sequence[Matrix], Sequence[Matrix], Sequence[Matrix]]:
        """Gate, up and down projections."""
        return self.gate, self.up, self.down


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """An output in one format: config, files, and which slot holds which blocks."""

    name: str
    checkpoint: Checkpoint
    config: dict[str, Any]
    stored: dict[int, Stored]
    """For each changed layer, what its files hold."""
    slots: dict[int, tuple[tuple[int, ...], ...]]
    """For each changed layer and stored expert, the blocks it is made of."""
    rows: dict[int, tuple[int, ...]]
    """For layers whose router shrinks, the rows that stay."""
    mask: dict[int, tuple[int, ...]]
    """For layers with dropped experts that keep all router rows, the ids that are dropped, where
    stock software can't express it."""
    silenced: dict[int, tuple[int, ...]]
    """The same where the router has a correction bias. It expresses all of it where each expert is
    scored by itself; where a softmax spans them, the mask has to say it too."""

    def runs(self) -> list[Run]:
        """The tensors to write."""
        return runs(self.checkpoint, self.stored, head=self._head)

    @property
    def _head(self) -> bool:
        return "compact_experts" not in self.config and needs_head(self.checkpoint)

    def edited(self) -> dict[str, int]:
        """Tensors beside the experts that do not go over byte for byte, with their layers."""
        family = self.checkpoint.family
        names = {family.gate_name(layer): layer for layer in self.rows}
        for layer in (*self.rows, *self.silenced):
            if bias := family.bias_name(layer):
                names[bias] = layer
        for layer, stored in self.stored.items():
            if stored.shared is not None:
                for name in family.shared_names(layer) or ():
                    tensors = self.checkpoint.scheme(name).tensors(name)
                    names |= dict.fromkeys(tensors.values(), layer)
        return names

    def copy_unchanged(self, writer: ShardWriter) -> None:
        """Write every tensor that is not an expert of a changed layer."""
        edited = self.edited()
        for entry in copied_entries(self.checkpoint, set(self.stored)):
            if entry.name in edited:
                writer.write(entry.name, self._edit(entry.name, edited[entry.name]))
            else:
                content = self.checkpoint.read_bytes(entry.name)
                writer.write_bytes(entry.name, content)
                if self._head and entry.name == EMBEDDING:
                    writer.write_bytes(HEAD, content)

    def _edit(self, name: str, layer: int) -> torch.Tensor:
        """A shared expert with neurons of zero added, a router with rows gone or silenced."""
        shared = self.checkpoint.family.shared_names(layer)
        whole = logical_name(name)
        if shared is not None and whole in shared:
            axis = COLUMNS if whole == shared.down else ROWS
            scheme, stored = self.checkpoint.scheme(whole), self.checkpoint.stored(whole)
            length, hidden = self.stored[layer].shared or 0, self.checkpoint.shape.hidden
            grown = scheme.join([stored], axis, length, hidden)
            return next(grown[e] for e, tensor in scheme.tensors(whole).items() if tensor == name)
        weight = self.checkpoint.read(name)
        if layer in self.rows:
            of_expert = -1 if name == self.checkpoint.family.bias_name(layer) else 0
            return weight.index_select(of_expert, torch.tensor(self.rows[layer]))
        weight = weight.clone()
        silence = max(_SILENCE, torch.finfo(weight.dtype).min)
        weight[..., list(self.silenced[layer])] = silence
        return weight

    def write_layer(self, writer: ShardWriter, layer: int, blocks: LayerBlocks) -> None:
        """Write one changed layer's experts. Memory beyond the blocks: one expert."""
        width, hidden = self.stored[layer].width, self.checkpoint.shape.hidden
        schemes = self.checkpoint.expert_scheme(layer)
        named = self.stored[layer].names(self.checkpoint.family, layer)
        for slot, (members, names) in enumerate(zip(self.slots[layer], named, strict=True)):
            for name, scheme, matrices, axis in zip(
                names, schemes, blocks.matrices, (ROWS, ROWS, COLUMNS), strict=True
            ):
                try:
                    whole = scheme.join([matrices[m] for m in members], axis, width, hidden)
                except InexactJoin as exc:
                    raise PlanError(
                        f"layer {layer}, expert {slot}: {exc}",
                        where=f"--format {self.name}",
                        remedy="use --format compact: only there has each block its own scale",
                    ) from None
                for ending, tensor in scheme.tensors(name).items():
                    writer.write(tensor, whole[ending])

        self._write_constants(writer, layer, blocks.constants_RD)

    def _write_constants(
        self, writer: ShardWriter, layer: int, constants_RD: torch.Tensor | None
    ) -> None:
        replaced, hidden = self.stored[layer].replaced, self.checkpoint.shape.hidden
        if not replaced:
            return
        if constants_RD is None:
            constants_RD = torch.zeros(len(replaced), hidden)
        dtype = TORCH_DTYPES[constant_dtype(self.checkpoint, layer)]
        for expert, value_D in zip(replaced, constants_RD, strict=True):
            name = constant_name(self.checkpoint.family, layer, expert)
            writer.write(name, value_D.to(dtype).cpu())

    def write_shared(self, writer: ShardWriter, layer: int, down: Matrix) -> None:
        """Write a new down projection [D, F] of the shared expert over the copied one."""
        names = self.checkpoint.family.shared_names(layer)
        if names is None:
            return
        scheme = self.checkpoint.scheme(names.down)
        if (length := self.stored[layer].shared) is not None:
            down = scheme.join([down], COLUMNS, length, self.checkpoint.shape.hidden)
        for ending, tensor in scheme.tensors(names.down).items():
            writer.write(tensor, down[ending].cpu())

    def write_router(self, writer: ShardWriter, layer: int, rows_ND: torch.Tensor) -> None:
        """Write new router rows: as many as are stored, or [N, D], of which those that stay."""
        if len(rows_ND) != self.stored[layer].rows:
            rows_ND = rows_ND[list(self.rows[layer])]
        writer.write(self.checkpoint.family.gate_name(layer), rows_ND.cpu().contiguous())

    def write_extras(self, target: Path) -> None:
        """Write ``router_mask.safetensors`` where stock software can't express the drops."""
        if not self.mask:
            return
        experts = self.checkpoint.shape.experts
        specs = [TensorSpec(name=str(i), dtype="F32", shape=(experts,)) for i in sorted(self.mask)]
        writer = ShardWriter(target, [(spec,) for spec in specs], file=ROUTER_MASK)
        for layer, dropped in self.mask.items():
            bias = torch.zeros(experts)
            bias[list(dropped)] = -torch.inf
            writer.write(str(layer), bias)
