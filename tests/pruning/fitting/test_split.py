"""Blocks as experts of a stock model: exact while nothing is gone, loadable when something is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from moe_serve.calibration.mixture import Mixture, read_mixture
from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.errors import PlanError
from moe_serve.families import Shape
from moe_serve.families.routing import Routing
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.fitting.build import build_blocks, pruned_mixture
from moe_serve.pruning.fitting.split import split_layer, split_plan, split_router, steady_direction
from moe_serve.pruning.methods.neurons import Ladder, block_obs
from moe_serve.pruning.methods.obs import RemovalPath
from moe_serve.pruning.methods.view import LayerView
from moe_serve.pruning.native import Size, choose, cuts, weigh
from moe_serve.pruning.plan import LayerPlan, Plan, Refit
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.calibrated import calibrated
from tests.support.models import make_model
from tests.support.references import our_logits, reference_logits

CPU = torch.device("cpu")
WIDTH, BLOCK = 96, 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated model: 8 experts of 96 neurons, top 2, hidden size 64."""
    root = tmp_path_factory.mktemp("split")
    calibrated(make_model(root / "m", "qwen3_moe", width=WIDTH, seed=3), root)
    return root


def ladder(experts: int) -> Ladder:
    """Neurons go in ascending order."""
    order = torch.arange(WIDTH).expand(experts, WIDTH)
    return Ladder(path=RemovalPath(order_NI=order, error_NI=order.double()))


def flat(plan: LayerPlan) -> LayerPlan:
    """The same with equal rows for all blocks of an expert."""
    assert plan.split is not None
    return plan.model_copy(update={"split": plan.split.model_copy(update={"step": 0.0})})


def as_stock(checkpoint: Checkpoint, layer: int, planned: LayerPlan) -> tuple[Mixture, Mixture]:
    """The layer, and what a stock model makes of it."""
    mixture, schemes = read_mixture(checkpoint, layer, CPU), checkpoint.expert_scheme(layer)
    blocks = build_blocks(checkpoint, layer, planned, mixture.units)
    source, blocks, table = split_layer(mixture, planned, blocks, schemes[2], torch.float32)
    return mixture, pruned_mixture(source, table, blocks, schemes)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "minimax_m2"])
def test_whole_experts_cut_in_three_are_the_same_layer(family: str, tmp_path: Path) -> None:
    """Softmax with and without renormalisation, and sigmoids with a bias for selection."""
    checkpoint = open_checkpoint(make_model(tmp_path / "m", family, width=WIDTH))
    shape, layer = checkpoint.shape, checkpoint.family.moe_layers(checkpoint.config)[0]
    planned = split_plan(
        ladder(shape.experts), BLOCK, [3] * shape.experts, 3 * shape.top_k, torch.zeros(64)
    )
    mixture, stock = as_stock(checkpoint, layer, flat(planned))
    assert len(stock.units) == 3 * shape.experts
    z_TD = torch.randn(50, shape.hidden, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stock(z_TD), mixture(z_TD), rtol=1e-4, atol=1e-4)


def test_the_neurons_that_matter_most_come_first() -> None:
    """95 … 64 stay longest: they are the first block of an expert that keeps two of three."""
    planned = split_plan(ladder(2), BLOCK, [2, 1], 2, torch.zeros(4))
    assert planned.experts == ((0, 1), (2,))
    assert planned.blocks[0].parts[0].neurons == tuple(range(64, 96))
    assert planned.blocks[1].parts[0].neurons == tuple(range(32, 64))
    assert planned.blocks[2].parts[0].expert == 1


def test_later_blocks_have_lower_logits(root: Path) -> None:
    """By 0.05 each where z·v is 1, as on the first coordinate here."""
    mixture = read_mixture(open_checkpoint(root / "m"), 0, CPU)
    direction_D = torch.zeros(64)
    direction_D[0] = 1.0
    planned = split_plan(ladder(8), BLOCK, [3, 2, 0, 3, 3, 3, 1, 3], 6, direction_D)
    assert planned.split is not None
    router = split_router(mixture.router, planned, planned.split, torch.float32)
    z_TD = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    z_TD[:, 0] = 1.0
    logits_TM = router.logits(z_TD)
    gap_T = logits_TM[:, 0] - logits_TM[:, 2]
    torch.testing.assert_close(gap_T, torch.full_like(gap_T, 0.1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits_TM[:, 3], mixture.router.logits(z_TD)[:, 1])


def test_steady_direction_finds_what_inputs_share() -> None:
    """One coordinate is 2 everywhere, the others are noise: v is half of it. Zeros don't count."""
    z_SD = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    z_SD[:, 3] = 2.0
    z_SD[::4] = 0.0
    v_D = steady_direction(z_SD)
    assert float(v_D[3]) == pytest.approx(0.5, abs=0.01)
    others_D = torch.cat([v_D[:3], v_D[4:]])
    assert float(others_D.abs().max()) < 0.02


def test_cuts_fill_the_budget() -> None:
    """Three quarters of 16 · 192 as blocks of 96, 64 and 32; 6 · 8 selected are more than 32."""
    shape = Shape(layers=2, hidden=64, experts=16, top_k=4, width=192, vocabulary=9)
    found = cuts(shape, Routing(top_k=4), 0.75)
    assert found == [Size(24, 96, 8), Size(36, 64, 12), Size(72, 32, 24)]
    assert [size.top_k for size in cuts(shape, Routing(top_k=8), 0.75)] == [16, 24]
    assert [size.experts for size in cuts(shape, Routing(top_k=4), 0.75, tile=64)] == [36]
    grouped = Routing(top_k=4, groups=4, groups_selected=2, group_score="best-two")
    assert cuts(shape, grouped, 0.75) == []


@pytest.fixture(scope="module")
def cut(root: Path) -> Path:
    """0.7 · 8 · 3 = 16 blocks of 32 neurons, six of them selected: chosen by hand."""
    checkpoint, statistics = open_checkpoint(root / "m"), Statistics(root / "statistics")
    selection = Selection(keep=0.7, uniform=True)
    plan = make_plan(checkpoint, statistics, selection, Silent(), form="native")
    views = (LayerView.of(checkpoint, statistics, i) for i in (0, 1))
    layers = weigh(views, block_obs, 0.7).layers(Size(16, BLOCK, 6))
    plan.model_copy(update={"layers": layers, "refit": Refit()}).save(root / "plan.json")
    prune(wish(root, root / "out", root / "plan.json"), Silent())
    return root / "out"


def wish(root: Path, output: Path, plan: Path, form: str = "native") -> PruneRequest:
    """Carry out a plan."""
    return PruneRequest(
        model=root / "m",
        output=output,
        texts=TextOptions(paths=(root / "texts.jsonl",), tokens=1024, length=128),
        selection=Selection(),
        form=form,
        batch_tokens=512,
        plan=plan,
    )


def test_blocks_load_in_stock_transformers(root: Path, cut: Path) -> None:
    """16 experts of 32 neurons, six selected; the same logits as in our forward."""
    made = open_checkpoint(cut)
    assert (made.shape.experts, made.shape.width, made.shape.top_k) == (16, BLOCK, 6)
    assert made.config["architectures"] == open_checkpoint(root / "m").config["architectures"]
    assert verify(cut, None, Silent()).problems == []
    ids = torch.randint(1, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    stock = reference_logits(cut, ids, {})
    torch.testing.assert_close(our_logits(cut, ids), stock, rtol=1e-4, atol=1e-4)


def test_rows_of_the_router_are_those_of_the_plan(root: Path, cut: Path) -> None:
    """The first block's is the original's, bit for bit."""
    plan, made = Plan.load(cut / "plan.json"), open_checkpoint(cut)
    original = open_checkpoint(root / "m")
    for index, layer in plan.layers.items():
        name = made.family.gate_name(index)
        rows, whole = made.read(name), original.read(name)
        for expert, listed in enumerate(layer.experts):
            if listed:
                assert torch.equal(rows[listed[0]], whole[expert])
            assert all(not torch.equal(rows[b], whole[expert]) for b in (listed or ())[1:])


def test_no_other_format_takes_such_a_plan(root: Path, cut: Path, tmp_path: Path) -> None:
    """There the router selects original experts."""
    with pytest.raises(PlanError, match="give --format native"):
        prune(wish(root, tmp_path / "out", cut / "plan.json", form="compact"), Silent())


def test_cuts_compete_with_whole_experts(root: Path) -> None:
    """Both kinds are on the shortlist, whatever their estimates."""
    checkpoint, statistics = open_checkpoint(root / "m"), Statistics(root / "statistics")
    views = [LayerView.of(checkpoint, statistics, i) for i in (0, 1)]
    weighed = weigh(views, block_obs, 0.7)
    kinds = {size.top_k for size in weighed.shortlist()}
    assert kinds == {None, 6}
    worse = dataclasses.replace(
        weighed,
        options={
            index: {s: o for s, o in options.items() if s.top_k is None}
            for index, options in weighed.options.items()
        },
    )
    assert choose(worse, None)[1]["size"]["top_k"] is None
