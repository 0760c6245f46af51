"""The plugin's table, against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest

from moe_serve_vllm.errors import TableError
from moe_serve_vllm.families import Groups
from moe_serve_vllm.table import parse, skips_padding, tables_of

EXPERTS, TOP_K, WIDTH = 8, 2, 64


def parsed(layer: Any) -> Any:
    """Parse a table of one layer."""
    value = {"version": 1, "layers": {"0": layer}}
    return parse(value, experts=EXPERTS, top_k=TOP_K, width=WIDTH, moe_layers=(0,))[0]


def test_padding_is_skipped_only_where_the_kernels_can() -> None:
    """On a CPU, and by CUDA kernels without a map, every slot is computed."""
    assert skips_padding(cuda=True, backend="TRITON")
    assert not skips_padding(cuda=True, backend="FLASHINFER_CUTLASS")
    assert not skips_padding(cuda=False, backend="CPU")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 48}, "width 48 is not a multiple of 32"),
        ({"experts": [[0]] * 7}, "lists 7 experts, the router has 8"),
        ({"experts": [[0, 0], *[[0]] * 7]}, "expert 0 lists a block twice"),
        ({"experts": [[5], *[[0]] * 7]}, "expert 0 lists block 5 of 1"),
        ({"blocks": 2}, "block 1 is used by no expert"),
        ({"blocks": 4}, "block 1 is used by no expert(?!.*block 2)"),
        ({"experts": [[0], *[None] * 7]}, "fewer than top_k=2 experts can be selected"),
        ({"experts": [["0"], *[[0]] * 7]}, "malformed entry"),
    ],
)
def test_defects_are_named(change: dict[str, Any], words: str) -> None:
    """Each defect has its own words."""
    layer = {"width": 32, "blocks": 1, "experts": [[0]] * 8} | change
    with pytest.raises(TableError, match=words):
        parsed(layer)


def test_the_table_is_read_with_its_models_sizes() -> None:
    """Layers 0 and 2 of three hold experts; 4 of them, two selected, 64 neurons."""
    config = {
        "architectures": ["CompactQwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    }
    layer = {"width": 32, "blocks": 2, "experts": [[0], [0, 1], [1], None]}
    config["compact_experts"] = {"version": 1, "layers": {"2": layer}}
    _, tables = tables_of(config)
    assert list(tables) == [2]
    assert tables[2].experts == ((0,), (0, 1), (1,), None)
    for wrong, words in (
        ({"num_experts": 5}, "lists 4 experts, the router has 5"),
        ({"num_experts_per_tok": 4}, "fewer than top_k=4 experts"),
        ({"mlp_only_layers": [2]}, "layer"),
        ({"compact_experts": {"version": 1}}, r"compact_experts: has no layers"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "names no compact architecture"),
    ):
        with pytest.raises(TableError, match=words):
            tables_of(config | wrong)


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
