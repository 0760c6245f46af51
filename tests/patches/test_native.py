"""Native in stock vLLM: no plugin, no table, the same numbers as in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.methods.neurons import block_obs
from moe_serve.pruning.methods.view import LayerView
from moe_serve.pruning.native import Size, weigh
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.patches.test_oracle import BOUND, off, prompts
from tests.support.calibrated import calibrated
from tests.support.engine import ask
from tests.support.models import make_model
from tests.support.references import reference_logprobs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.45 · 8 · 96 = 345 neurons may stay, in each of the ways there are."""
    root = tmp_path_factory.mktemp("native")
    checkpoint = open_checkpoint(make_model(root / "m", "qwen3_moe", width=96))
    statistics = calibrated(root / "m", root)
    selection = Selection(keep=0.45, uniform=True)
    plan = make_plan(checkpoint, statistics, selection, Silent(), form="native")
    views = (LayerView.of(checkpoint, statistics, i) for i in (0, 1))
    weighed = weigh(views, block_obs, 0.45)
    for name, size in {"fewer": Size(5, 64), "cut": Size(10, 32, 6)}.items():
        plan.model_copy(update={"layers": weighed.layers(size)}).save(root / f"{name}.json")
        request = PruneRequest(
            model=root / "m",
            output=root / name,
            texts=TextOptions(paths=(root / "texts.jsonl",), tokens=1024, length=128),
            selection=selection,
            form="native",
            batch_tokens=512,
            plan=root / f"{name}.json",
        )
        prune(request, Silent())
    return root


def test_native_in_stock_vllm_equals_transformers(root: Path) -> None:
    """Experts dropped and narrowed, or cut into blocks: in memory what is on disk."""
    made = [root / "fewer", root / "cut"]
    for out, answer in zip(made, ask(made, prompts()), strict=True):
        assert off(answer, reference_logprobs(out, prompts(), {})) <= 2 * BOUND
        assert not isinstance(answer, str)
        assert answer.expert_bytes == sum(open_checkpoint(out).expert_bytes().values())
