"""The plugin's table, against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_serve_vllm.errors import TableError
from moe_serve_vllm.families import Groups
from moe_serve_vllm.table import expand, parse, skips_padding
from tests.support.twins import random_table

EXPERTS, TOP_K, WIDTH = 8, 2, 64


def parsed(layer: Any) -> Any:
    """Parse a table of one layer."""
    value = {"version": 1, "layers": {"0": layer}}
    return parse(value, experts=EXPERTS, top_k=TOP_K, width=WIDTH, moe_layers=(0,))[0]


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
    blocks, spread = expand(ids, weights, *table.slots())
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
    blocks, spread = expand(ids, weights, *table.slots())
    computed = (output[blocks] * spread).sum(dim=1)

    blocks, spread = expand(ids, weights, *table.slots(skipped=True))
    places = table.placement()[blocks]
    assert torch.equal(places >= 0, spread > 0)
    kept = [
        sum(output[p] * w for p, w in zip(row, ws, strict=True) if p >= 0)
        for row, ws in zip(places.tolist(), spread, strict=True)
    ]
    assert [float(k) for k in kept] == pytest.approx(computed.tolist(), abs=1e-6)


def test_padding_is_skipped_only_where_the_kernels_can() -> None:
    """On a CPU, and by CUDA kernels without a map, every slot is computed."""
    assert skips_padding(cuda=True, backend="TRITON")
    assert not skips_padding(cuda=True, backend="FLASHINFER_CUTLASS")
    assert not skips_padding(cuda=False, backend="CPU")


class Expansion(torch.nn.Module):
    """The remap as the layer calls it."""

    def __init__(self, slots: torch.Tensor, used: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("slots", slots)
        self.register_buffer("used", used)

    def forward(
        self, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights of blocks."""
        return expand(ids, weights, self.get_buffer("slots"), self.get_buffer("used"))


def test_expansion_never_waits_for_the_device() -> None:
    """Traced for any number of tokens: nothing reads a value back, no shape depends on one.

    So it can be part of a CUDA graph. 8 experts, 2 per token, up to 2 blocks each: 4 columns.
    """
    table = parsed(random_table(1, "blocks", experts=EXPERTS, width=WIDTH, top_k=TOP_K))
    assert table.most_blocks == 2
    exported = torch.export.export(
        Expansion(*table.slots(skipped=True)),
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 48}, "width 48 is not a multiple of 32"),
        ({"experts": [[0]] * 7}, "lists 7 experts, the router has 8"),
        ({"experts": [[0, 0], *[[0]] * 7]}, "expert 0 lists a block twice"),
        ({"experts": [[5], *[[0]] * 7]}, "expert 0 lists block 5 of 1"),
        ({"blocks": 2}, "block 1 is used by no expert"),
        ({"experts": [[0], *[None] * 7]}, "fewer than top_k=2 experts can be selected"),
        ({"experts": [["0"], *[[0]] * 7]}, "malformed entry"),
    ],
)
def test_defects_are_named(change: dict[str, Any], words: str) -> None:
    """Each defect has its own words."""
    layer = {"width": 32, "blocks": 1, "experts": [[0]] * 8} | change
    with pytest.raises(TableError, match=words):
        parsed(layer)


@pytest.mark.parametrize(
    ("best", "dropped", "sound"),
    [
        # 8 experts in 4 groups, 2 groups selected, top 2.
        (2, (0, 1, 2, 3, 4, 5), True),  # one whole group is left: its two are selected
        (2, (0, 2, 4, 6), False),  # each group keeps one: none can be ranked by its two best
        (2, (0, 1, 2), True),  # a group with one is passed over for those with two
        (1, (0, 2, 4, 6), True),  # ranked by the best: any two groups hold two experts
        (1, (0, 1, 2, 3, 4, 5, 6), False),
    ],
)
def test_grouped_routers_must_find_top_k(best: int, dropped: tuple[int, ...], sound: bool) -> None:
    """Whichever groups a token prefers, two experts can be selected in them."""
    lists: list[Any] = [None if e in dropped else [0] for e in range(EXPERTS)]
    value = {
        "version": 1,
        "layers": {"0": {"width": 32, "blocks": 1, "experts": lists}},
    }
    groups = Groups(count=4, selected=2, best=best)

    def read() -> Any:
        return parse(
            value, experts=EXPERTS, top_k=TOP_K, width=WIDTH, moe_layers=(0,), groups=groups
        )

    if sound:
        assert read()[0].dropped == dropped
    else:
        with pytest.raises(TableError, match="fewer than top_k=2"):
            read()


def test_all_defects_come_in_one_message() -> None:
    """Nobody has to mend one to see the next."""
    value = {
        "version": 1,
        "layers": {
            "0": {"width": 31, "blocks": 1, "experts": [[0]] * 8},
            "7": {"width": 32, "blocks": 1, "experts": [[0]] * 8},
        },
    }
    with pytest.raises(TableError) as caught:
        parse(value, experts=EXPERTS, top_k=TOP_K, width=WIDTH, moe_layers=(0,))
    assert "layer 0" in str(caught.value)
    assert "layer 7: no layer with experts" in str(caught.value)
