"""Merged experts in a stock model: one row for several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_serve.calibration.mixture import Router
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.errors import PlanError
from moe_serve.families.routing import Routing
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.fitting.joining import log_sum_rows
from moe_serve.pruning.fitting.refit import FitTokens
from moe_serve.pruning.fitting.split import one_row_each, split_router
from moe_serve.pruning.plan import Block, LayerPlan, Part, Plan, Split
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.calibrated import calibrated
from tests.support.models import make_model
from tests.support.references import our_logits, reference_logits


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated model of 8 experts, top 2."""
    root = tmp_path_factory.mktemp("joining")
    calibrated(make_model(root / "m", "qwen3_moe", seed=3), root)
    return root


def wish(root: Path, output: Path, **selection: object) -> PruneRequest:
    """A merge for stock software."""
    return PruneRequest(
        model=root / "m",
        output=output,
        texts=TextOptions(paths=(root / "texts.jsonl",), tokens=1024, length=128),
        selection=Selection(uniform=True, **selection),  # type: ignore[arg-type]
        form="native",
        statistics=root / "statistics",
        batch_tokens=512,
    )


def pairs() -> LayerPlan:
    """Experts 0 and 1 are one block, 2 stands alone."""
    every = tuple(range(4))
    return LayerPlan(
        width=4,
        blocks=(
            Block(parts=tuple(Part(expert=e, neurons=every, coefficient=0.5) for e in (0, 1))),
            Block(parts=(Part(expert=2, neurons=every),)),
        ),
        experts=((0,), (0,), (1,)),
        split=Split(top_k=1),
    )


def test_the_mean_row_stands_for_several() -> None:
    """(1, 0) and (3, 2) make (2, 1); the third stays."""
    rows = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
    router = Router(weight_ND=rows, rule=Routing(top_k=2))
    split = pairs().split
    assert split is not None
    found = split_router(router, pairs(), split, torch.float32)
    assert torch.equal(found.weight_ND, torch.tensor([[2.0, 1.0], [5.0, 5.0]]))
    assert found.rule.top_k == 1


def test_equal_members_gain_the_log_of_their_number(tmp_path: Path) -> None:
    """Two rows alike: log-sum-exp is the logit + log 2, and inputs with a constant can say so."""
    z_TD = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    z_TD[:, 2] = 1.0
    row = torch.tensor([0.3, -0.2, 0.1])
    router = Router(weight_ND=torch.stack([row, row, -row]), rule=Routing(top_k=2))
    inputs = States(tmp_path / "z.f32", 3)
    batch = Batch(sequences=(0,), shape=(1, 400), tokens=slice(0, 400), device=torch.device("cpu"))
    batch.store(inputs, z_TD[None])
    tokens = FitTokens(
        batches=(batch,), omega_T=torch.ones(400), held_T=torch.zeros(400, dtype=torch.bool)
    )
    found = log_sum_rows(router, torch.stack([row, -row]), pairs(), inputs, tokens)
    expected = torch.stack([row + torch.tensor([0.0, 0.0, 0.6931]), -row])
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.0)


def test_merged_experts_load_in_stock_transformers(root: Path, tmp_path: Path) -> None:
    """Four of eight, every one merged or alone, with rows of their own."""
    chosen = {"keep": 0.5, "method": "merge-hc", "refit": True}
    prune(wish(root, tmp_path / "out", **chosen), Silent())
    made = open_checkpoint(tmp_path / "out")
    assert (made.shape.experts, made.shape.top_k) == (4, 2)
    assert made.config["num_experts_per_tok"] == 2
    ids = torch.randint(1, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    stock = reference_logits(tmp_path / "out", ids, {})
    torch.testing.assert_close(our_logits(tmp_path / "out", ids), stock, rtol=1e-4, atol=1e-4)
    refit = json.loads((tmp_path / "out" / "moe_serve.json").read_text())["refit"]
    for layer in refit.values():
        errors = layer["merged_rows"]["held_out_error"]
        assert layer["merged_rows"]["chosen"] == min(errors, key=lambda name: errors[name])
        assert layer["error_after"] < layer["error_before"]


def test_fewer_than_the_router_selects_is_refused(root: Path, tmp_path: Path) -> None:
    """One group of eight; two are selected. Compact has no such limit."""
    with pytest.raises(PlanError, match="the router selects 2"):
        prune(wish(root, tmp_path / "out", experts=1, method="merge-hc"), Silent())


def test_drops_keep_their_rows(root: Path, tmp_path: Path) -> None:
    """A plan in which nothing is shared is left as it is."""
    prune(wish(root, tmp_path / "out", keep=0.5, method="merge-ream", refit=False), Silent())
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert all(layer.split is None for layer in plan.layers.values())


def test_routers_with_a_bias_are_refused(tmp_path: Path) -> None:
    """Its correction bias would have to be re-balanced."""
    checkpoint = open_checkpoint(make_model(tmp_path / "m", "minimax_m2"))
    with pytest.raises(PlanError, match="correction bias"):
        one_row_each(checkpoint, {0: pairs()})
