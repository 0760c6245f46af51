"""Weights that are damaged, experts that nothing reaches, a config of another model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import CheckpointError
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.methods.registry import METHODS
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.calibrated import calibrated
from tests.support.models import change_config, change_weights, make_model
from tests.support.references import our_logits

LONELY = 3
"""An expert that no token reaches."""


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its correction bias keeps it from ever being selected."""
    path = make_model(tmp_path_factory.mktemp("m") / "m", "glm4_moe")

    def silence(weights: dict[str, torch.Tensor]) -> None:
        for layer in (1, 2):
            weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"][LONELY] = -50.0

    change_weights(path, silence)
    return path


@pytest.fixture(scope="module")
def statistics(lonely: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """Of that model."""
    return calibrated(lonely, tmp_path_factory.mktemp("s"))


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)):
        yield float(value)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_expert_without_tokens_is_no_division_by_zero(
    name: str, lonely: Path, statistics: Statistics
) -> None:
    """Every score is a number; whatever measures what experts did spares nothing of this one."""
    constants = name == "drop-constant"
    wanted = Selection(keep=0.5, method=name, constants=constants)
    made = make_plan(open_checkpoint(lonely), statistics, wanted, Silent())
    assert made.layers
    for layer in made.layers.values():
        assert all(map(math.isfinite, numbers(json.loads(json.dumps(layer.why)))))
        parts = [part for block in layer.blocks for part in block.parts]
        blind = ("block-magnitude", "drop-aimer", "drop-random")
        if name not in blind and not METHODS[name].merges:
            assert not [part for part in parts if part.expert == LONELY]
        assert all(math.isfinite(part.coefficient) for part in parts)


def test_an_expert_without_tokens_leaves_finite_weights(
    lonely: Path, statistics: Statistics, tmp_path: Path
) -> None:
    """The re-fit solves for experts that were never seen as well."""
    texts = statistics.folder.parent / "texts.jsonl"
    for method in ("block-obs", "block-magnitude"):
        request = PruneRequest(
            model=lonely,
            output=tmp_path / method,
            texts=TextOptions(paths=(texts,), tokens=1024, length=128),
            selection=Selection(keep=0.5, method=method, refit=True),
        )
        prune(request, Silent())
        assert verify(tmp_path / method, lonely, Silent()).problems == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.experts.4.down_proj.weight",
        "model.layers.2.mlp.shared_experts.gate_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_value_that_is_no_number_is_named(name: str, value: float, tmp_path: Path) -> None:
    """Whatever tensor it is in."""
    path = make_model(tmp_path / "m", "glm4_moe")

    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights[name].view(-1)[-1] = value

    change_weights(path, damage)
    with pytest.raises(CheckpointError, match=f"{name}.*NaN or infinite.*fetch it again"):
        our_logits(path, torch.arange(1, 9)[None])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_group": 3}, "does not divide"),
        ({"num_experts_per_tok": 9}, "of 8 experts"),
        (
            {"num_hidden_layers": 2, "num_nextn_predict_layers": 0},
            "belongs to a layer beyond the 2",
        ),
        ({"num_hidden_layers": 4}, r"no shard holds tensor 'model\.layers\.3\."),
        ({"n_shared_experts": 2}, r"is \[64, 64\], n_shared_experts = 2 makes \[128, 64\]"),
        ({"first_k_dense_replace": 0}, r"no shard holds tensor 'model\.layers\.0\.mlp\.gate"),
        ({"hidden_size": 32}, "8 experts of hidden size 32"),
        ({"num_attention_heads": 4}, r"(?s)do not fit the architecture.*size mismatch"),
        ({"rms_norm_eps": "small"}, "does not describe a model of its family"),
    ],
)
def test_a_config_that_contradicts_the_weights(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Another model's config.json, one value at a time."""
    path = make_model(tmp_path / "m", "glm4_moe")
    change_config(path, **changes)
    with pytest.raises(CheckpointError, match=words):
        our_logits(path, torch.arange(1, 9)[None])
