"""One layer's routed experts as sums of units: the same forward for original and pruned.

Shape suffixes: T tokens, D hidden size, N original experts, F neurons of one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from moe_serve.checkpoint.source import Checkpoint
from moe_serve.checkpoint.substitution import constant_name
from moe_serve.checkpoint.table import LayerTable
from moe_serve.errors import UnsupportedFamily
from moe_serve.families import Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Neurons that the same experts own, FP32: f(x) = down (act(gate x) * (up x))."""

    owners: tuple[int, ...]
    """None for a shared expert: every token takes it."""
    gate_FD: torch.Tensor
    up_FD: torch.Tensor
    down_DF: torch.Tensor
    constant: bool = False
    """A single neuron that is always 1, whatever gate and up: f(x) is the down projection."""

    @property
    def width(self) -> int:
        """F."""
        return int(self.gate_FD.shape[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """From the mixture's input to each expert's weight, by the family's rule."""

    weight_ND: torch.Tensor
    rule: Routing
    bias_N: torch.Tensor | None = None
    """Added to the scores for selection only."""
    dropped: tuple[int, ...] = ()
    """Experts that are never selected: their logit is minus infinity."""

    def logits(self, z_TD: torch.Tensor) -> torch.Tensor:
        """Router logits [T, N], dropped experts at minus infinity."""
        logits_TN = z_TD @ self.weight_ND.T
        if self.dropped:
            logits_TN[:, list(self.dropped)] = -torch.inf
        return logits_TN

    def __call__(self, z_TD: torch.Tensor) -> torch.Tensor:
        """Weights [T, N] given to each expert, zero where it is not selected."""
        logits_TN, never_N = z_TD @ self.weight_ND.T, None
        if self.dropped:
            never_N = torch.zeros(len(self.weight_ND), dtype=torch.bool, device=z_TD.device)
            never_N[list(self.dropped)] = True
        return self.weigh(logits_TN, never_N)

    def weigh(self, logits_TN: torch.Tensor, never: torch.Tensor | None = None) -> torch.Tensor:
        """The same from logits; ``never``, [N] or [T, N], is where an expert can't be selected."""
        rule = self.rule
        scores_TN, choice_TN = self.scored(logits_TN, never)
        chosen_TK = torch.topk(self._in_groups(choice_TN), rule.top_k, dim=-1).indices
        values_TK = scores_TN.gather(1, chosen_TK)
        if rule.renormalise:
            values_TK = values_TK / values_TK.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        values_TK = values_TK * rule.scale
        return torch.zeros_like(scores_TN).scatter(1, chosen_TK, values_TK)

    def scored(
        self, logits_TN: torch.Tensor, never: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores, and what experts and groups are ranked by, [T, N] each."""
        if never is not None:
            logits_TN = logits_TN.masked_fill(never, -torch.inf)
        if self.rule.score == "softmax":
            scores_TN = torch.softmax(logits_TN, dim=-1)
        else:
            scores_TN = torch.sigmoid(logits_TN)
        choice_TN = scores_TN if self.bias_N is None else scores_TN + self.bias_N
        return scores_TN, choice_TN if never is None else choice_TN.masked_fill(never, -torch.inf)

    def _in_groups(self, choice_TN: torch.Tensor) -> torch.Tensor:
        """Without the experts of groups that are not selected."""
        rule = self.rule
        if rule.groups == 1:
            return choice_TN
        grouped_TGn = choice_TN.view(len(choice_TN), rule.groups, -1)
        group_TG = grouped_TGn.topk(rule.group_best, dim=-1).values.sum(dim=-1)
        kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        kept_TG.scatter_(1, group_TG.topk(rule.groups_selected, dim=-1).indices, value=True)
        return grouped_TGn.masked_fill(~kept_TG[:, :, None], -torch.inf).flatten(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """The expert that every token takes."""

    unit: Unit
    gate_1D: torch.Tensor | None = None
    """Its sigmoid scales the output."""

    def scale(self, z_TD: torch.Tensor) -> torch.Tensor:
        """What each token's output is multiplied by, [T, 1]."""
        if self.gate_1D is None:
            return z_TD.new_ones(len(z_TD), 1)
        return torch.sigmoid(z_TD @ self.gate_1D.T)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Router and units of one layer, and the shared expert where there is one."""

    router: Router
    units: tuple[Unit, ...]
    activation: Callable[[torch.Tensor], torch.Tensor]
    shared: Shared | None = None

    def always(self, z_TD: torch.Tensor) -> torch.Tensor:
        """What the shared expert adds [T, D]; zeros without one."""
        if self.shared is None:
            return torch.zeros_like(z_TD)
        out_TD = self.hidden(self.shared.unit, z_TD) @ self.shared.unit.down_DF.T
        return out_TD if self.shared.gate_1D is None else out_TD * self.shared.scale(z_TD)

    def hidden(self, unit: Unit, z_TD: torch.Tensor) -> torch.Tensor:
        """A unit's neurons h [T, F] on tokens z, before any routing weight."""
        if unit.constant:
            return z_TD.new_ones(len(z_TD), 1)
        return self.gated(z_TD @ unit.gate_FD.T, z_TD @ unit.up_FD.T)

    def gated(self, gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
        """Neurons from the two projections of the input."""
        active_TF = self.activation(gate_TF)
        return active_TF * up_TF if active_TF.requires_grad else active_TF.mul_(up_TF)

    def activations(
        self, z_TD: torch.Tensor
    ) -> Iterator[tuple[Unit, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each unit some token reached: (unit, token indices, weights, neurons h).

        The weight of a unit is the sum over those of its owners that the token selected; that of a
        shared expert among the units is its scale.
        """
        weights_NT = self.router(z_TD).T.contiguous()
        for unit in self.units:
            if len(unit.owners) == 1:
                weight_T = weights_NT[unit.owners[0]]
            elif unit.owners or self.shared is None:
                weight_T = weights_NT[list(unit.owners)].sum(dim=0)
            else:
                weight_T = self.shared.scale(z_TD)[:, 0]
            index = torch.nonzero(weight_T).squeeze(1)
            if len(index):
                yield unit, index, weight_T[index], self.hidden(unit, z_TD[index])

    def __call__(self, z_TD: torch.Tensor) -> torch.Tensor:
        """The layer's output [T, D]."""
        out_TD = self.always(z_TD)
        for unit, index, weight_t, h_tF in self.activations(z_TD):
            # The product before the weight, as the calibration pass has it: the same bits.
            out_TD.index_add_(0, index, (h_tF @ unit.down_DF.T) * weight_t[:, None])
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
            gate_FD=_joined([gate[b] for b in blocks], 0),
            up_FD=_joined([up[b] for b in blocks], 0),
            down_DF=_joined([down[b] for b in blocks], 1),
        )
        for owners, blocks in blocks_by_owners(table)
    )


def _joined(parts: list[torch.Tensor], axis: int) -> torch.Tensor:
    # torch.cat copies even a single tensor, which would hold a whole layer twice.
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def constant_units(value_of: Mapping[int, torch.Tensor]) -> tuple[Unit, ...]:
    """Experts that put out the same vector [D] for every token, by id."""
    return tuple(
        Unit(
            owners=(expert,),
            gate_FD=value_D.new_zeros(1, len(value_D)),
            up_FD=value_D.new_zeros(1, len(value_D)),
            down_DF=value_D[:, None],
            constant=True,
        )
        for expert, value_D in sorted(value_of.items())
    )


def whole_experts(count: int, width: int) -> LayerTable:
    """The table of an untouched layer: one block of full width per expert."""
    return LayerTable(width=width, blocks=count, experts=tuple((e,) for e in range(count)))


def read_router(checkpoint: Checkpoint, layer: int, device: torch.device) -> Router:
    """Load one layer's router in FP32."""
    family, shape = checkpoint.family, checkpoint.shape
    table = checkpoint.table.layers.get(layer)
    name, bias_N = family.bias_name(layer), None
    if name is not None:
        bias_N = _read(checkpoint, name, device, family.bias_shape(shape.experts)).flatten()
    return Router(
        weight_ND=_read(checkpoint, family.gate_name(layer), device, (shape.experts, shape.hidden)),
        rule=family.routing_of(checkpoint.config),
        bias_N=bias_N,
        dropped=table.dropped if table else (),
    )


def read_shared(checkpoint: Checkpoint, layer: int, device: torch.device) -> Shared | None:
    """Load the shared expert in FP32, if the family has one."""
    family = checkpoint.family
    names = family.shared_names(layer)
    if names is None or not checkpoint.has(names.gate):
        return None
    gate, up, down = (_read(checkpoint, name, device) for name in names)
    scale = family.shared_gate
    return Shared(
        unit=Unit(owners=(), gate_FD=gate, up_FD=up, down_DF=down),
        gate_1D=_read(checkpoint, scale.format(layer=layer), device) if scale else None,
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
        names = checkpoint.block_names(layer, block)
        for name, into in zip(names, (gates, ups, downs), strict=True):
            into.append(_read(checkpoint, name, device))
    constants = {
        expert: _read(checkpoint, constant_name(family, layer, expert), device)
        for expert in checkpoint.replaced.get(layer, ())
    }
    return Mixture(
        router=read_router(checkpoint, layer, device),
        units=make_units(table, gates, ups, downs) + constant_units(constants),
        activation=_activation(checkpoint),
        shared=read_shared(checkpoint, layer, device),
    )


def _activation(checkpoint: Checkpoint) -> Callable[[torch.Tensor], torch.Tensor]:
    # Takes seconds to import, for which what only reads or checks files need not wait.
    from transformers.activations import ACT2FN

    name = checkpoint.config.get("hidden_act", "silu")
    if name not in ACT2FN:
        raise UnsupportedFamily(
            f"hidden_act is {name!r}, which transformers has no function for",
            where=str(checkpoint.path / "config.json"),
            remedy="set it to the one the model was trained with, mostly silu",
        )
    activation: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return activation


def _read(
    checkpoint: Checkpoint, name: str, device: torch.device, shape: tuple[int, ...] | None = None
) -> torch.Tensor:
    return checkpoint.weight(name, shape).to(device)
