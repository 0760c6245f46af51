"""From selected experts to stored blocks, at run time."""

# Shape suffixes: T tokens, K experts selected per token, N experts, R most blocks of any expert,
#   S = K * R slots per token, P slots that hold a block, D model dim.

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import nn

from moe_serve_vllm.table import LayerTable

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Inputs, weights and ids to the weighted sum of each row's blocks."""
_FEW: Final = 64
"""Tokens up to which one call for all slots takes less time than one for each number of blocks."""


class Remap(nn.Module):
    """A layer's table on its device; not among the parameters that a checkpoint must fill."""

    slots: torch.Tensor
    used: torch.Tensor
    counts: torch.Tensor

    def __init__(self, table: LayerTable, *, skipped: bool = False) -> None:
        """Lay the table out; ``skipped`` as in :meth:`LayerTable.slots`."""
        super().__init__()
        slots_NR, used_NR = table.slots(skipped=skipped)
        self.register_buffer("slots", slots_NR, persistent=False)
        self.register_buffer("used", used_NR, persistent=False)
        self.register_buffer("counts", used_NR.sum(dim=1).long(), persistent=False)
        self.padded = table.padded

    def forward(
        self, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace each selected expert by its blocks, all with that expert's weight.

        Shapes depend on those of the inputs only, and nothing is read back to the host.

        Returns:
            Block ids and weights, both [T, S], in the inputs' types. The weight of a slot without
            a block is 0.
        """
        tokens, selected = ids_TK.shape
        most = self.slots.shape[1]
        index = ids_TK.flatten()
        blocks_TS = self.slots.index_select(0, index).view(tokens, selected * most)
        if self.padded:
            used_TKR = self.used.index_select(0, index).view(tokens, selected, most)
            weights_TS = (weights_TK.unsqueeze(-1) * used_TKR).flatten(1)
        elif most == 1:
            weights_TS = weights_TK
        else:
            weights_TS = weights_TK.repeat_interleave(most, dim=1)
        return blocks_TS.to(ids_TK.dtype), weights_TS.to(weights_TK.dtype)


def sum_used(
    remap: Remap,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    experts: Experts,
) -> torch.Tensor:
    """Compute the slots that hold a block, and nothing for the others.

    For kernels that compute every slot they are given. How many there are is read back to the
    host, which costs nothing where that is the device.

    Returns:
        The same [T, D] as ``experts`` on all slots. In short floats parts of the sum are rounded
        before they are added up, as vLLM's kernels for GPUs do.
    """
    if len(ids_TK) > _FEW:
        return _sum_by_count(remap, x_TD, weights_TK, ids_TK, experts)
    blocks_TS, weights_TS = remap(ids_TK, weights_TK)
    tokens, slots = blocks_TS.shape
    flat_TS = weights_TS.flatten()
    places_P = flat_TS.nonzero().squeeze(1)
    if not len(places_P):
        return torch.zeros_like(x_TD)
    weights_P = flat_TS.index_select(0, places_P)
    blocks_P = blocks_TS.flatten().index_select(0, places_P)
    if tokens == 1:
        return experts(x_TD, weights_P.unsqueeze(0), blocks_P.unsqueeze(0))
    token_P = places_P.div(slots, rounding_mode="floor")
    # Each slot as a token of its own, with one block.
    out_PD = experts(x_TD.index_select(0, token_P), weights_P.unsqueeze(1), blocks_P.unsqueeze(1))
    # torch adds consecutive rows up fastest as the embeddings of a bag.
    starts_T = torch.searchsorted(token_P, torch.arange(tokens, device=token_P.device))
    rows_P = torch.arange(len(out_PD), device=out_PD.device)
    return nn.functional.embedding_bag(rows_P, out_PD, starts_T, mode="sum")


def _sum_by_count(
    remap: Remap,
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    experts: Experts,
) -> torch.Tensor:
    """Selections whose experts have the same number of blocks, in one call; Q of them."""
    flat_ids, flat_weights = ids_TK.flatten(), weights_TK.flatten()
    counts = remap.counts.index_select(0, flat_ids)
    sizes = counts.bincount(minlength=remap.slots.shape[1] + 1).tolist()
    sum_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for count, chosen_Q in enumerate(counts.argsort(stable=True).split(sizes)):
        if count and len(chosen_Q):
            token_Q = chosen_Q.div(ids_TK.shape[1], rounding_mode="floor")
            blocks_QR = remap.slots.index_select(0, flat_ids.index_select(0, chosen_Q))
            weights_Q1 = flat_weights.index_select(0, chosen_Q).unsqueeze(1)
            out_QD = experts(
                x_TD.index_select(0, token_Q),
                weights_Q1.repeat(1, count),
                blocks_QR[:, :count].to(ids_TK.dtype).contiguous(),
            )
            sum_TD.index_add_(0, token_Q, out_QD.float())
    return sum_TD.to(x_TD.dtype)
