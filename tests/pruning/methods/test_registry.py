"""Every registered method on a tiny model; published rules against their formulas."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_serve.calibration.gradients import GRADIENT_TOKENS
from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.errors import UsageError
from moe_serve.progress import Silent
from moe_serve.pruning.methods.drops import drop_aimer, drop_man, drop_seer, drop_taylor
from moe_serve.pruning.methods.naee import _Search, drop_naee
from moe_serve.pruning.methods.neurons import block_heapr, block_obs
from moe_serve.pruning.methods.registry import METHODS, gradient_tokens
from moe_serve.pruning.methods.view import Budget, LayerView
from moe_serve.pruning.plan import LayerPlan
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.selection import Selection
from tests.support.calibrated import calibrated
from tests.support.models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 0's expert 6 puts out nothing; neuron 7 of its expert 2 neither."""
    path = make_model(tmp_path_factory.mktemp("m") / "m", "qwen3_moe", seed=4)
    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.mlp.experts.6.down_proj.weight"].zero_()
    weights["model.layers.0.mlp.experts.2.down_proj.weight"][:, 7] = 0.0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Checkpoint:
    """Opened."""
    return open_checkpoint(model)


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """Of that model on two domains."""
    return calibrated(checkpoint.path, tmp_path_factory.mktemp("s"))


@pytest.fixture(scope="module")
def view(checkpoint: Checkpoint, statistics: Statistics) -> LayerView:
    """Layer 0."""
    return LayerView.of(checkpoint, statistics, 0)


def kept(plan: LayerPlan) -> list[int]:
    """Experts that stay."""
    return [e for e, blocks in enumerate(plan.experts) if blocks is not None]


HALF = Budget(keep=0.5, block_width=64)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"drop-constant"}))
def test_every_method_keeps_half_and_says_why(
    name: str, checkpoint: Checkpoint, statistics: Statistics
) -> None:
    """A valid plan of the right size, the same twice, with a reason per expert."""
    selection = Selection(keep=0.5, method=name)
    plans = [make_plan(checkpoint, statistics, selection, Silent()) for _ in "ab"]
    assert plans[0].sha256() == plans[1].sha256()
    assert sum(layer.neurons_kept() for layer in plans[0].layers.values()) == 2 * 8 * 64 // 2
    for layer in plans[0].layers.values():
        assert len(layer.why["neurons_kept"]) == 8


@pytest.mark.parametrize(
    "name",
    ["drop-reap", "drop-ean", "drop-man", "drop-msan", "drop-taylor", "drop-fisher"],
)
def test_an_expert_without_output_goes_first(name: str, view: LayerView) -> None:
    """Whatever measures outputs sees that expert 6 has none."""
    choose = METHODS[name].experts
    assert choose is not None
    budget = Budget(keep=7 / 8, block_width=64)
    assert kept(choose(view, budget)) == [0, 1, 2, 3, 4, 5, 7]


@torch.inference_mode()
def test_naee_finds_the_best_subset(view: LayerView) -> None:
    """Enumeration is the minimum; greedy with swaps comes close and is never better."""
    search = _Search.of(view.mixture(), view.observed().reservoir_SD)
    chosen = kept(drop_naee(view, HALF))
    subsets = list(itertools.combinations(range(8), 4))
    errors = [search.error(s) for s in subsets]
    assert search.error(chosen) == pytest.approx(min(errors))
    greedy = search.error(search.greedy(4))
    assert min(errors) - 1e-9 <= greedy <= np.percentile(errors, 10)


@torch.inference_mode()
def test_naee_error_is_the_layers_own(view: LayerView) -> None:
    """The Gram matrix says what the layer's forward with dropped experts says."""
    mixture, z_SD = view.mixture(), view.observed().reservoir_SD
    import dataclasses

    fewer = dataclasses.replace(
        mixture, router=dataclasses.replace(mixture.router, dropped=(0, 3, 5))
    )
    expected = (fewer(z_SD) - mixture(z_SD)).square().sum(dim=1).mean()
    found = _Search.of(mixture, z_SD).error([1, 2, 4, 6, 7])
    assert found == pytest.approx(float(expected), rel=1e-3)


def test_scores_are_the_papers(view: LayerView, model: Path) -> None:
    """AIMER from the weights, MAN, SEER and Taylor from the sums."""
    weights = load_file(model / "model.safetensors")
    names = ("gate_proj", "up_proj", "down_proj")
    aimer = []
    for expert in range(8):
        flat = torch.cat(
            [weights[f"model.layers.0.mlp.experts.{expert}.{n}.weight"].flatten() for n in names]
        )
        aimer.append(float(flat.abs().mean() / flat.square().mean().sqrt()))
    plan = drop_aimer(view, HALF)
    assert plan.why["scores"]["aimer"] == pytest.approx(aimer, rel=1e-5)
    assert kept(plan) == sorted(np.argsort(aimer)[:4].tolist())
    seen = view.observed()
    norm, count, weight = (x.sum(0) for x in (seen.norm_CN, seen.count_CN, seen.weight_CN))
    man = (norm / count.clamp(min=1)).tolist()
    assert drop_man(view, HALF).why["scores"]["man"] == pytest.approx(man)
    assert kept(drop_seer(view, HALF)) == sorted(weight.argsort(descending=True)[:4].tolist())
    taylor = view.gradients().taylor_N
    assert kept(drop_taylor(view, HALF)) == sorted(taylor.argsort(descending=True)[:4].tolist())


def test_a_dead_neuron_is_the_first_to_go(view: LayerView) -> None:
    """By re-fitted error and by HEAPr's importance alike."""
    for ladder in (block_obs(view), block_heapr(view)):
        assert int(ladder.path.order_NI[2, 0]) == 7
        assert float(ladder.path.error_NI[6, -1]) == pytest.approx(0.0, abs=1e-9)


def test_obs_error_is_the_refitted_error_in_the_losss_metric(view: LayerView) -> None:
    """Removing a set and solving for the rest leaves tr(M ΔᵀHΔ), H with the ridge."""
    path = block_obs(view).path
    seen, metric = view.observed(), view.gradients().metric()
    down = view.projection(2)[1].double()
    normal = seen.normal_NII[1].double() / seen.weight
    mean = (seen.normal_NII.diagonal(dim1=1, dim2=2).double() / seen.weight).mean()
    normal = normal + 0.01 * mean * torch.eye(64)
    gone, stay = path.order_NI[1, :20], path.order_NI[1, 20:]
    solved = torch.linalg.solve(normal[stay][:, stay], normal[stay][:, gone] @ down[:, gone].T)
    change = torch.zeros(64, 64, dtype=torch.float64)
    change[gone], change[stay] = -down[:, gone].T, solved
    expected = torch.trace(change.T @ normal @ change @ metric)
    assert float(path.error_NI[1, 19]) == pytest.approx(float(expected), rel=5e-3)


def test_layers_get_what_the_loss_needs(checkpoint: Checkpoint, statistics: Statistics) -> None:
    """Over the model the summed error is at most that of equal shares, at equal bytes."""
    across, each = (
        make_plan(checkpoint, statistics, Selection(keep=0.5, across_layers=flag), Silent()).layers
        for flag in (True, False)
    )

    def error(layers: dict[int, LayerPlan]) -> float:
        return sum(sum(layer.why["error_added"]) for layer in layers.values())

    assert error(across) <= error(each) * (1 + 1e-9)
    sizes = [sum(p.neurons_kept() for p in layers.values()) for layers in (across, each)]
    assert sizes[0] == sizes[1]


def test_a_run_takes_as_many_gradients_as_its_method_asks_for() -> None:
    """None, enough for a metric of the model's width, or enough to rank every neuron."""
    assert gradient_tokens("drop-reap", 128) == 0
    assert [gradient_tokens("auto", width) for width in (128, 2048, 7168)] == [4096, 4096, 14_336]
    assert gradient_tokens("block-heapr", 128) == GRADIENT_TOKENS


def test_gradients_without_texts_are_refused(checkpoint: Checkpoint) -> None:
    """A view without statistics says what is missing."""
    bare = LayerView.of(checkpoint, None, 0)
    with pytest.raises(UsageError, match="needs calibration texts"):
        block_heapr(bare)
