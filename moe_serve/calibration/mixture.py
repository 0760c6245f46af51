"""One layer's routed experts as sums of units: the same forward for original and pruned.

Shape suffixes: T tokens, D hidden size, N original experts, F neurons of one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers.activations import ACT2FN

from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.table import LayerTable
from moe_serve.errors import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Neurons that the same experts own, FP32: f(x) = down (act(gate x) * (up x))."""

    owners: tuple[int, ...]
    gate_FD: torch.Tensor
    up_FD: torch.Tensor
    down_DF: torch.Tensor

    @property
    def width(self) -> int:
        """F."""
        return int(self.gate_FD.shape[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """Softmax over logits, top k, optionally renormalised (Mixtral; Qwen3-MoE)."""

    weight_ND: torch.Tensor
    top_k: int
    renormalise: bool
    dropped: tuple[int, ...] = ()
    """Experts whose logit is minus infinity."""

    def logits(self, z_TD: torch.Tensor) -> torch.Tensor:
        """Router logits [T, N], dropped experts at minus infinity."""
        logits_TN = z_TD @ self.weight_ND.T
        if self.dropped:
            logits_TN[:, list(self.dropped)] = -torch.inf
        return logits_TN

    def __call__(self, z_TD: torch.Tensor) -> torch.Tensor:
        """Weights [T, N] given to each expert, zero where it is not selected."""
        probabilities_TN = torch.softmax(self.logits(z_TD), dim=-1)
        values_TK, chosen_TK = torch.topk(probabilities_TN, self.top_k, dim=-1)
        if self.renormalise:
            values_TK = values_TK / values_TK.sum(dim=-1, keepdim=True)
        return torch.zeros_like(probabilities_TN).scatter_(1, chosen_TK, values_TK)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Router and units of one layer."""

    router: Router
    units: tuple[Unit, ...]
    activation: Callable[[torch.Tensor], torch.Tensor]

    def hidden(self, unit: Unit, z_TD: torch.Tensor) -> torch.Tensor:
        """A unit's neurons h [T, F] on tokens z, before any routing weight."""
        return self.activation(z_TD @ unit.gate_FD.T) * (z_TD @ unit.up_FD.T)

    def activations(
        self, z_TD: torch.Tensor
    ) -> Iterator[tuple[Unit, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each unit some token reached: (unit, token indices, weights, neurons h).

        The weight of a unit is the sum over those of its owners that the token selected.
        """
        weights_TN = self.router(z_TD)
        for unit in self.units:
            weight_T = weights_TN[:, list(unit.owners)].sum(dim=1)
            index = torch.nonzero(weight_T).squeeze(1)
            if len(index):
                yield unit, index, weight_T[index], self.hidden(unit, z_TD[index])

    def __call__(self, z_TD: torch.Tensor) -> torch.Tensor:
        """The layer's routed output [T, D]."""
        out_TD = torch.zeros_like(z_TD)
        for unit, index, weight_t, h_tF in self.activations(z_TD):
            out_TD.index_add_(0, index, (h_tF * weight_t[:, None]) @ unit.down_DF.T)
        return out_TD


def blocks_by_owners(table: LayerTable) -> list[tuple[tuple[int, ...], list[int]]]:
    """Sets of experts with the blocks that exactly they own, in order of first block."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for block, owners in enumerate(table.owners()):
        groups.setdefault(owners, []).append(block)
    return list(groups.items())


def make_units(
    table: LayerTable, gate: list[torch.Tensor], up: list[torch.Tensor], down: list[torch.Tensor]
) -> tuple[Unit, ...]:
    """Join blocks that the same experts own; fewer, wider matrix products.

    Args:
        table: the layer's remapping.
        gate: gate weight [b, D] of each block.
        up: up weight [b, D] of each block.
        down: down weight [D, b] of each block.
    """
    return tuple(
        Unit(
            owners=owners,
            gate_FD=torch.cat([gate[b] for b in blocks]),
            up_FD=torch.cat([up[b] for b in blocks]),
            down_DF=torch.cat([down[b] for b in blocks], dim=1),
        )
        for owners, blocks in blocks_by_owners(table)
    )


def whole_experts(count: int, width: int) -> LayerTable:
    """The table of an untouched layer: one block of full width per expert."""
    return LayerTable(width=width, blocks=count, experts=tuple((e,) for e in range(count)))


def read_router(checkpoint: Checkpoint, layer: int, device: torch.device) -> Router:
    """Load one layer's router in FP32."""
    family, shape = checkpoint.family, checkpoint.shape
    table = checkpoint.table.layers.get(layer)
    weight = checkpoint.read(family.gate_name(layer), (shape.experts, shape.hidden))
    return Router(
        weight_ND=_finite(weight, family.gate_name(layer), checkpoint).to(device, torch.float32),
        top_k=shape.top_k,
        renormalise=family.renormalises(checkpoint.config),
        dropped=table.dropped if table else (),
    )


def read_mixture(checkpoint: Checkpoint, layer: int, device: torch.device) -> Mixture:
    """Load one layer's router and experts in FP32. Peak memory: that layer, once.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    family, shape = checkpoint.family, checkpoint.shape
    stored = checkpoint.table.layers.get(layer)
    table = stored or whole_experts(shape.experts, shape.width)
    gates: list[torch.Tensor] = []
    ups: list[torch.Tensor] = []
    downs: list[torch.Tensor] = []
    for block in range(table.blocks):
        names = family.expert_names(layer, block)
        for name, into in zip(names, (gates, ups, downs), strict=True):
            weight = _finite(checkpoint.read(name), name, checkpoint)
            into.append(weight.to(device, torch.float32))
    return Mixture(
        router=read_router(checkpoint, layer, device),
        units=make_units(table, gates, ups, downs),
        activation=ACT2FN[checkpoint.config.get("hidden_act", "silu")],
    )


def _finite(weight: torch.Tensor, name: str, checkpoint: Checkpoint) -> torch.Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(
            f"tensor {name!r} holds NaN or infinite values",
            where=str(checkpoint.entry(name).file),
            remedy="the file is damaged or the model diverged in training; fetch it again",
        )
    return weight
