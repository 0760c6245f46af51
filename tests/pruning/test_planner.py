"""What a plan may ask of the kernels that serve it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.checkpoint.table import MOST_BLOCKS
from moe_serve.evaluation.inspection import inspect
from moe_serve.progress import Silent
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.selection import Selection, block_width
from moe_serve_vllm.table import MOST_SORTED
from tests.support.calibrated import calibrated
from tests.support.models import change_weights, make_model
from tests.support.twins import make_twins


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 experts of 256 neurons in both layers, those of the second worth far more."""
    root = tmp_path_factory.mktemp("many")
    model = make_model(root / "m", "qwen3_moe", experts=128, width=256, hidden_size=32)

    def weigh(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            if ".layers.1." in name and "down_proj" in name:
                weights[name] *= 4

    change_weights(model, weigh)
    return model


def test_no_layer_has_more_blocks_than_gpus_sort(many: Path) -> None:
    """Blocks of 32: of 1,024 in each layer 922 may stay on average, in one at most 991.

    1,843 are spent on both all the same.
    """
    statistics = calibrated(many, many.parent)
    selection = Selection(keep=0.9, method="block-heapr")
    plan = make_plan(open_checkpoint(many), statistics, selection, Silent())
    counts = [len(layer.blocks) for layer in plan.layers.values()]
    assert max(counts) == MOST_BLOCKS
    assert sum(counts) == int(0.9 * 2 * 1024)
    assert {layer.width for layer in plan.layers.values()} == {32}


def test_blocks_widen_where_there_would_be_too_many(many: Path) -> None:
    """0.97 · 1,024 = 993 blocks of 32 are more than 991, so experts are cut into four of 64.

    Whoever asks for 32 by name gets them: processors serve them.
    """
    checkpoint = open_checkpoint(many)
    assert block_width(checkpoint, None, keep=0.96) == 32
    assert block_width(checkpoint, None, keep=0.97) == 64
    assert block_width(checkpoint, 32, keep=0.97) == 32
    plan = make_plan(
        checkpoint,
        None,
        Selection(keep=0.98, method="block-magnitude", block_width=32),
        Silent(),
    )
    assert max(len(layer.blocks) for layer in plan.layers.values()) > MOST_BLOCKS


@pytest.mark.parametrize(("blocks", "anywhere"), [(991, True), (992, False)])
def test_what_no_gpu_serves_is_said_by_inspect(
    many: Path, blocks: int, anywhere: bool, tmp_path: Path
) -> None:
    """The plugin refuses it there, by the same number."""
    lists = [list(range(8 * e, min(8 * e + 8, blocks))) for e in range(128)]
    table = {"width": 32, "blocks": blocks, "experts": lists}
    make_twins(many, tmp_path / "compact", tmp_path / "tied", {1: table})
    assert ("GPUs sort no 992" in inspect(tmp_path / "compact")["served_by"]) != anywhere
    assert MOST_SORTED == MOST_BLOCKS
