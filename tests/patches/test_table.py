"""The plugin's table, against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_serve_vllm.errors import TableError
from moe_serve_vllm.table import expand, parse
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
