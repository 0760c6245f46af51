"""From experts to blocks, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_serve_vllm.remap import Remap, sum_used
from moe_serve_vllm.table import LayerTable
from tests.patches.test_table import EXPERTS, TOP_K, WIDTH, parsed
from tests.support.twins import random_table


@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["whole", "blocks", "merged", "empty", "dropped", "mixed"]),
)
def test_expansion_equals_a_plain_loop(seed: int, kind: str) -> None:
    """Each block receives the summed weight of the selected experts that own it."""
    layer = random_table(seed, kind, experts=EXPERTS, width=WIDTH, top_k=TOP_K)
    table = parsed(layer)
    generator = torch.Generator().manual_seed(seed)
    allowed = [e for e, blocks in enumerate(layer["experts"]) if blocks is not None]
    picks = [torch.randperm(len(allowed), generator=generator)[:TOP_K] for _ in range(5)]
    ids = torch.tensor([[allowed[i] for i in p] for p in picks])
    weights = torch.rand(5, TOP_K, generator=generator)
    blocks, spread = Remap(table)(ids, weights)
    for token in range(5):
        expected = [0.0] * layer["blocks"]
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            for block in layer["experts"][expert]:
                expected[block] += weight
        found = [0.0] * layer["blocks"]
        for block, weight in zip(blocks[token].tolist(), spread[token].tolist(), strict=True):
            found[block] += weight
        assert found == pytest.approx(expected, abs=1e-6)


@given(seed=st.integers(0, 1000), kind=st.sampled_from(["blocks", "empty", "mixed"]))
def test_skipped_slots_give_the_same_sum(seed: int, kind: str) -> None:
    """Leaving a slot out is the same as weight 0, and only the slots without a block are left out.

    Each block's output is a number of its own, so the sums differ wherever a block does.
    """
    table = parsed(random_table(seed, kind, experts=EXPERTS, width=WIDTH, top_k=TOP_K))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(5)])
    weights = torch.rand(5, TOP_K, generator=generator)
    output = torch.rand(table.blocks, generator=generator)
    blocks, spread = Remap(table)(ids, weights)
    computed = (output[blocks] * spread).sum(dim=1)

    blocks, spread = Remap(table, skipped=True)(ids, weights)
    places = table.placement()[blocks]
    assert torch.equal(places >= 0, spread > 0)
    kept = [
        sum(output[p] * w for p, w in zip(row, ws, strict=True) if p >= 0)
        for row, ws in zip(places.tolist(), spread, strict=True)
    ]
    assert [float(k) for k in kept] == pytest.approx(computed.tolist(), abs=1e-6)


def test_expansion_never_waits_for_the_device() -> None:
    """Traced for any number of tokens: nothing reads a value back, no shape depends on one.

    So it can be part of a CUDA graph. 8 experts, 2 per token, up to 2 blocks each: 4 columns.
    """
    table = parsed(random_table(1, "blocks", experts=EXPERTS, width=WIDTH, top_k=TOP_K))
    assert table.most_blocks == 2
    exported = torch.export.export(
        Remap(table, skipped=True),
        (torch.zeros(5, TOP_K, dtype=torch.int32), torch.rand(5, TOP_K)),
        dynamic_shapes=({0: torch.export.Dim("tokens")}, {0: torch.export.Dim("tokens")}),
    )
    calls = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert calls
    forbidden = ("item", "_local_scalar_dense", "nonzero", "masked_select", "unique", "to_cpu")
    assert not [c for c in calls if any(word in c for word in forbidden)]
    for tokens in (2, 7, 300):
        ids = torch.arange(tokens * TOP_K).view(tokens, TOP_K).int() % EXPERTS
        blocks, spread = exported.module()(ids, torch.ones(tokens, TOP_K))
        assert blocks.shape == spread.shape == (tokens, 2 * TOP_K)


@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["whole", "blocks", "merged", "empty", "dropped", "mixed"]),
    tokens=st.sampled_from([1, 2, 9, 65]),
)
def test_only_used_slots_are_computed(seed: int, kind: str, tokens: int) -> None:
    """The same sums as over all slots, and no block is asked for with weight 0.

    Block b turns x into (b + 1) · x, so a row in the wrong place shows.
    """
    layer = random_table(seed, kind, experts=EXPERTS, width=WIDTH, top_k=TOP_K)
    generator = torch.Generator().manual_seed(seed)
    allowed = [e for e, blocks in enumerate(layer["experts"]) if blocks is not None]
    picks = [torch.randperm(len(allowed), generator=generator)[:TOP_K] for _ in range(tokens)]
    ids = torch.tensor([[allowed[i] for i in p] for p in picks], dtype=torch.int32)
    x, weights = torch.rand(tokens, 3), torch.rand(tokens, TOP_K) + 0.1
    asked: list[torch.Tensor] = []

    def experts(rows: torch.Tensor, spread: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        asked.append(spread)
        return rows * (spread * (blocks + 1)).sum(dim=1, keepdim=True)

    remap = Remap(parsed(layer))
    blocks, spread = remap(ids, weights)
    everything = experts(x, spread, blocks)
    asked.clear()
    found = sum_used(remap, x, weights, ids, experts)
    assert found.shape == x.shape
    assert torch.allclose(found, everything, atol=1e-5)
    assert all(bool((one > 0).all()) for one in asked)
    owned = [sum(len(layer["experts"][e]) for e in row) for row in ids.tolist()]
    assert sum(one.numel() for one in asked) == sum(owned)


def test_a_dropped_expert_is_no_padding() -> None:
    """It is never selected, so the others are even."""
    assert not LayerTable(width=32, blocks=2, experts=((0,), None, (1,))).padded
    assert LayerTable(width=32, blocks=2, experts=((0,), (), (1,))).padded


@pytest.mark.parametrize("tokens", [1, 65])
def test_no_block_at_all_adds_nothing(tokens: int) -> None:
    """No kernel is asked to compute zero rows."""
    remap = Remap(LayerTable(width=32, blocks=1, experts=((), ())))
    ids, weights = torch.tensor([[0, 1]]).repeat(tokens, 1), torch.ones(tokens, 2)

    def experts(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    assert not sum_used(remap, torch.ones(tokens, 3), weights, ids, experts).any()


@pytest.mark.parametrize("tokens", [2, 65])
def test_parts_are_added_up_in_full_precision(tokens: int) -> None:
    """300 experts of one block that gives 1 are 300; one at a time in BF16, 256 + 1 stays 256.

    One expert without a block is what makes the layer ragged.
    """
    experts_of = (*((block,) for block in range(300)), ())
    remap = Remap(LayerTable(width=32, blocks=300, experts=experts_of))
    ids = torch.arange(301).repeat(tokens, 1)
    x = torch.ones(tokens, 1, dtype=torch.bfloat16)

    def experts(rows: torch.Tensor, spread: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return (rows * spread.sum(dim=1, keepdim=True)).to(rows.dtype)

    summed = sum_used(remap, x, torch.ones(tokens, 301), ids, experts)
    assert summed.dtype == x.dtype
    assert summed.flatten().tolist() == [300.0] * tokens
