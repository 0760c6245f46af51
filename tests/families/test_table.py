"""The rows themselves: which layers are mixtures, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from moe_serve.errors import UnsupportedFamily
from moe_serve.families import FAMILIES, family_of
from moe_serve.families.table import REFUSED
from moe_serve_vllm.families import FAMILIES as PLUGIN_ROWS
from tests.support.models import FAMILIES as TESTED
from tests.support.models import settings_of


def test_every_row_has_a_tiny_model() -> None:
    """A new row without its test parameter fails here."""
    assert {row.model_type for row in FAMILIES} == set(TESTED)


def test_served_is_what_the_plugin_has_rows_for() -> None:
    """Two tables, one of which is installed without the other."""
    ours = {row.compact_architecture for row in FAMILIES if row.served}
    assert ours == {row.architecture for row in PLUGIN_ROWS}


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_known_architectures_without_a_row_say_why(model_type: str) -> None:
    """The reason, and what is supported."""
    with pytest.raises(
        UnsupportedFamily, match=r"give a checkpoint of one that has: .*mixtral"
    ) as error:
        family_of({"model_type": model_type})
    assert REFUSED[model_type] in str(error.value)


@pytest.mark.parametrize("value", [None, 3, "llama", ["mixtral"]])
def test_anything_else_is_unknown(value: object) -> None:
    """Whatever a config.json may hold."""
    with pytest.raises(UnsupportedFamily, match="unknown"):
        family_of({"model_type": value})


def test_another_task_is_refused() -> None:
    """A classifier has the family's layers and another head."""
    config = {"model_type": "mixtral", "architectures": ["MixtralForSequenceClassification"]}
    with pytest.raises(UnsupportedFamily, match="give the MixtralForCausalLM"):
        family_of(config)


@pytest.mark.parametrize(
    ("family", "changes", "layers"),
    [
        ("qwen3_moe", {}, (0, 1, 2, 3, 4, 5)),
        ("qwen3_moe", {"decoder_sparse_step": 2}, (1, 3, 5)),
        ("qwen3_moe", {"mlp_only_layers": [0, 3]}, (1, 2, 4, 5)),
        ("deepseek", {"first_k_dense_replace": 1}, (1, 2, 3, 4, 5)),
        ("deepseek", {"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4)),
        ("glm4_moe_lite", {"mlp_layer_types": None, "first_k_dense_replace": 2}, (2, 3, 4, 5)),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense"] * 3}, (0, 2, 4)),
        ("ernie4_5_moe", {}, (1, 2, 3, 4, 5)),
        ("ernie4_5_moe", {"moe_layer_end_index": 4, "moe_layer_interval": 2}, (1, 3)),
        ("ernie4_5_moe", {"moe_layer_start_index": None, "moe_layer_end_index": 0}, (0,)),
    ],
)
def test_layers_with_experts(family: str, changes: dict[str, Any], layers: tuple[int, ...]) -> None:
    """Six layers, by each family's own keys."""
    config = settings_of(family) | {"model_type": family, "num_hidden_layers": 6} | changes
    assert family_of(config).moe_layers(config) == layers


@pytest.mark.parametrize("value", [None, 0, -1, 2.0, "8", True])
def test_a_size_that_is_none_is_named(value: object) -> None:
    """The key and what it holds."""
    config = settings_of("mixtral") | {"num_local_experts": value}
    with pytest.raises(UnsupportedFamily, match="'num_local_experts' is"):
        family_of({"model_type": "mixtral"}).shape(config)


@pytest.mark.parametrize(
    ("family", "changes", "longest"),
    [
        ("mixtral", {}, 256),
        ("mixtral", {"sliding_window": 128}, 128),
        ("deepseek_v3", {"index_topk": 64}, 256),
        ("deepseek_v32", {}, 64),
        ("deepseek_v32", {"index_topk": 2048}, 256),
        ("mixtral", {"max_position_embeddings": None}, None),
    ],
)
def test_longest_plainly_causal_sequence(
    family: str, changes: dict[str, Any], longest: int | None
) -> None:
    """256 positions; a window, or an indexer's choice, may be narrower."""
    config = settings_of(family) | {"model_type": family} | changes
    assert family_of(config).longest(config) == longest
