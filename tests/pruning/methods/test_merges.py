"""Merge methods on a tiny model with planted copies; published rules by plain loops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_serve.calibration.mixture import read_mixture
from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.errors import PlanError, UsageError
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.methods.merges import (
    merge_cka,
    merge_cka_weights,
    merge_gradient,
    merge_hc,
    merge_msmoe,
    merge_ream,
    merge_weights,
)
from moe_serve.pruning.methods.merging import merged_unit
from moe_serve.pruning.methods.reservoir import Reservoir
from moe_serve.pruning.methods.view import Budget, LayerView
from moe_serve.pruning.plan import LayerPlan
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.calibrated import calibrated
from tests.support.models import make_model

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def plant_copies(path: Path, layer: int, source: int, copies: list[int]) -> None:
    """Make experts the same function as ``source``, each with its neurons in another order."""
    file = path / "model.safetensors"
    weights = load_file(file)
    for copy in copies:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(copy))
        for projection in PROJECTIONS:
            name = f"model.layers.{layer}.mlp.experts.{{}}.{projection}.weight"
            weight = weights[name.format(source)]
            shuffled = weight[:, order] if projection == "down_proj" else weight[order]
            weights[name.format(copy)] = shuffled.contiguous()
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where model, texts and statistics lie."""
    return tmp_path_factory.mktemp("merges")


@pytest.fixture(scope="module")
def checkpoint(root: Path) -> Checkpoint:
    """Layer 0's expert 5 does what expert 1 does."""
    path = make_model(root / "model", "qwen3_moe", seed=8)
    plant_copies(path, 0, 1, [5])
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint, root: Path) -> Statistics:
    """Of that model."""
    return calibrated(checkpoint.path, root)


@pytest.fixture(scope="module")
def view(checkpoint: Checkpoint, statistics: Statistics) -> LayerView:
    """Layer 0."""
    return LayerView.of(checkpoint, statistics, 0)


def seven(**wishes: object) -> Budget:
    """All but one expert."""
    return dataclasses.replace(Budget(keep=7 / 8, block_width=64), **wishes)  # type: ignore[arg-type]


def half(**wishes: object) -> Budget:
    """Four of eight."""
    return dataclasses.replace(Budget(keep=0.5, block_width=64), **wishes)  # type: ignore[arg-type]


def merged(plan: LayerPlan) -> list[list[int]]:
    """Groups of more than one."""
    return [group["members"] for group in plan.why["groups"]]


@pytest.mark.parametrize("method", [merge_cka, merge_cka_weights, merge_weights])
@torch.inference_mode()
def test_a_shuffled_copy_is_merged_first_and_exactly(
    method: Callable[[LayerView, Budget], LayerPlan], view: LayerView
) -> None:
    """Experts 1 and 5 share a block that does what expert 1 does, to 1e-6 of its weights' size."""
    plan = method(view, seven())
    assert merged(plan) == [[1, 5]]
    assert plan.experts[1] == plan.experts[5]
    assert plan.experts[1] is not None
    mixture, z = view.mixture(), view.observed().reservoir_SD
    unit = merged_unit(mixture, plan.blocks[plan.experts[1][0]], (1, 5))
    outputs = [mixture.hidden(u, z) @ u.down_DF.T for u in (mixture.units[1], unit)]
    assert float((outputs[1] - outputs[0]).norm()) <= 1e-6 * float(outputs[0].norm())
    assert [len(b.parts) for b in plan.blocks].count(1) == 6


@torch.inference_mode()
def test_hc_merges_the_copy_as_its_source_does_without_alignment(view: LayerView) -> None:
    """Neuron i with neuron i, by frequency."""
    plan = merge_hc(view, seven())
    assert merged(plan) == [[1, 5]]
    block = plan.blocks[plan.experts[1][0]]  # type: ignore[index]
    every = tuple(range(64))
    assert [part.neurons for part in block.parts] == [every, every]
    frequency = view.observed().frequency()
    share = float(frequency[1] / (frequency[1] + frequency[5]))
    assert [p.coefficient for p in block.parts] == pytest.approx([share, 1 - share])


@torch.inference_mode()
def test_hc_groups_by_mean_outputs_of_all_experts(view: LayerView) -> None:
    """Join by hand the two clusters of least mean distance until four are left."""
    mixture, z = view.mixture(), view.observed().reservoir_SD
    means = [(mixture.hidden(u, z) @ u.down_DF.T).double().mean(0) for u in mixture.units]
    clusters = [[e] for e in range(8)]
    while len(clusters) > 4:
        pairs = {
            (a, b): float(
                torch.stack(
                    [(means[i] - means[j]).norm() for i in clusters[a] for j in clusters[b]]
                ).mean()
            )
            for a in range(len(clusters))
            for b in range(a + 1, len(clusters))
        }
        a, b = min(pairs, key=lambda pair: pairs[pair])
        clusters[a] += clusters.pop(b)
    assert sorted(merged(merge_hc(view, half()))) == sorted(
        sorted(c) for c in clusters if len(c) > 1
    )


@torch.inference_mode()
def test_msmoe_gathers_around_the_most_used(view: LayerView) -> None:
    """Leaders are the four most selected; others join by the cosine of raw logits; all stay."""
    plan = merge_msmoe(view, half())
    seen = view.observed()
    logits = view.mixture().router.logits(seen.reservoir_SD)
    leaders = seen.frequency().argsort(descending=True)[:4].tolist()
    expected: dict[int, list[int]] = {leader: [leader] for leader in leaders}
    for e in set(range(8)) - set(leaders):
        similar = [
            torch.nn.functional.cosine_similarity(logits[:, e], logits[:, c], dim=0)
            for c in leaders
        ]
        expected[leaders[int(torch.stack(similar).argmax())]].append(e)
    assert sorted(merged(plan)) == sorted(sorted(g) for g in expected.values() if len(g) > 1)
    assert all(owners is not None for owners in plan.experts)
    for leader, group in expected.items():
        assert {plan.experts[e] for e in group} == {plan.experts[leader]}
        block = plan.blocks[plan.experts[leader][0]]  # type: ignore[index]
        total = float(seen.frequency()[group].sum())
        for part in block.parts:
            share = float(seen.frequency()[part.expert]) / total
            assert part.coefficient == pytest.approx(share if len(group) > 1 else 1.0)
            if part.expert == leader:
                assert part.neurons == tuple(range(64))


def test_msmoe_spends_its_budget_over_the_whole_model(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    """Eight of sixteen experts lead: the most frequent of the model; or four in each layer."""
    across = make_plan(
        checkpoint, statistics, Selection(keep=0.5, method="merge-msmoe"), Silent()
    ).layers
    ranked = sorted(
        ((-float(f), layer) for layer in (0, 1) for f in statistics.layer(layer).frequency()),
    )[:8]
    counts = {layer: [entry[1] for entry in ranked].count(layer) for layer in (0, 1)}
    assert {i: len(p.blocks) for i, p in across.items()} == counts
    each = make_plan(
        checkpoint,
        statistics,
        Selection(keep=0.5, method="merge-msmoe", across_layers=False),
        Silent(),
    ).layers
    assert [len(p.blocks) for p in each.values()] == [4, 4]


@torch.inference_mode()
def test_ream_merges_the_weak_into_the_strongest(view: LayerView) -> None:
    """With groups of up to 16 the most salient takes in all four weak ones; their rows go."""
    plan = merge_ream(view, half())
    saliency = view.observed().reap()
    order = saliency.argsort(descending=True).tolist()
    strong, weak = order[:4], sorted(order[4:])
    assert [e for e, owners in enumerate(plan.experts) if owners is None] == weak
    assert merged(plan) == [sorted([strong[0], *weak])]
    block = plan.blocks[plan.experts[strong[0]][0]]
    total = float(saliency[[strong[0], *weak]].sum())
    for part in block.parts:
        assert part.coefficient == pytest.approx(float(saliency[part.expert]) / total)
        assert sorted(part.neurons) == list(range(64))


@torch.inference_mode()
def test_gradients_that_agree_group_experts(view: LayerView) -> None:
    """Of the sums of a real run, and of planted ones: 2 and 6 pull the same way."""
    assert view.loss is not None
    maps = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(0))
    maps[6] = 3.0 * maps[2]
    planted = dataclasses.replace(view, loss=dataclasses.replace(view.loss, map_NRR=maps))
    assert merged(merge_gradient(planted, seven())) == [[2, 6]]
    similarity = torch.tensor(merge_gradient(view, seven()).why["similarity"])
    flat = view.loss.map_NRR.double().flatten(1)
    expected = torch.nn.functional.cosine_similarity(flat[3], flat[4], dim=0)
    assert float(similarity[3, 4]) == pytest.approx(float(expected), rel=1e-3)


@torch.inference_mode()
def test_a_merge_has_to_beat_dropping_on_held_out_tokens(view: LayerView) -> None:
    """The error named is that of the plan carried out on tokens that did not make it."""
    plan = merge_cka(view, half())
    held = Reservoir.of(view.mixture(), view.observed().reservoir_SD).held_out()
    assert merged(plan)
    for group in plan.why["groups"]:
        others = [e for e in group["members"] if e != group["kept"]]
        assert group["error"]["drop"] == pytest.approx(held.error(dropped=others, replaced={}))
        better = "merge" if group["error"]["merge"] < group["error"]["drop"] else "drop"
        assert group["chosen"] == better
        owners = {plan.experts[e] for e in others}
        assert owners == ({plan.experts[group["kept"]]} if better == "merge" else {None})


@torch.inference_mode()
def test_the_rule_can_be_asked_for_and_left_out(view: LayerView) -> None:
    """Only then are errors measured."""
    always = merge_cka(view, half(drop_when_better=False))
    assert all(g["chosen"] == "merge" and "error" not in g for g in always.why["groups"])
    assert None not in always.experts
    judged = merge_hc(view, half(drop_when_better=True))
    assert all("error" in g for g in judged.why["groups"])


@torch.inference_mode()
def test_coefficients_replace_the_methods_own(view: LayerView) -> None:
    """Even shares; least squares that beat them on the group's own output error, to first order."""
    even = merge_hc(view, seven(coefficients="uniform"))
    assert even.why["groups"][0]["shares"] == [0.5, 0.5]
    for method in (merge_cka, merge_cka_weights, merge_ream):
        shares = method(view, half(coefficients="qp")).why["groups"][0]["shares"]
        assert sum(shares) == pytest.approx(1.0)
        assert min(shares) >= 0


def test_impossible_wishes_are_refused(checkpoint: Checkpoint, statistics: Statistics) -> None:
    """Coefficients of a drop, unknown ones, and what can't be known without texts."""

    def refuse(match: str, seen: Statistics | None = statistics, **wishes: object) -> None:
        selection = Selection(keep=0.5, **wishes)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=match):
            make_plan(checkpoint, seen, selection, Silent())

    refuse("drop-reap merges nothing", method="drop-reap", coefficients="qp")
    refuse("block-obs merges nothing", drop_when_better=True)
    refuse("no coefficients", method="merge-hc", coefficients="mean")
    refuse("qp needs", None, method="merge-weights", coefficients="qp")
    refuse("can't be measured", None, method="merge-weights", drop_when_better=True)
    with pytest.raises(PlanError, match="router selects 2"):
        make_plan(checkpoint, statistics, Selection(experts=1, method="merge-ream"), Silent())
    plan = make_plan(checkpoint, statistics, Selection(experts=1, method="merge-hc"), Silent())
    assert all(len(layer.blocks) == 1 for layer in plan.layers.values())


@pytest.mark.parametrize("method", ["merge-cka", "merge-cka-weights", "merge-weights"])
def test_a_model_of_equal_experts_loses_nothing(method: str, tmp_path: Path) -> None:
    """Eight shuffled copies in each layer merged to two: every layer's output is equal to 1e-6."""
    path = make_model(tmp_path / "model", "qwen3_moe", seed=9)
    for layer in (0, 1):
        plant_copies(path, layer, 0, list(range(1, 8)))
    statistics = calibrated(path, tmp_path)
    prune(
        PruneRequest(
            model=path,
            output=tmp_path / "out",
            texts=TextOptions(paths=(tmp_path / "texts.jsonl",), tokens=1024, length=128),
            selection=Selection(experts=2, method=method),
            statistics=statistics.folder,
        ),
        Silent(),
    )
    for layer in (0, 1):
        z = statistics.layer(layer).reservoir_SD
        before, after = (
            read_mixture(open_checkpoint(p), layer, torch.device("cpu"))(z)
            for p in (path, tmp_path / "out")
        )
        assert float((after - before).norm()) <= 1e-6 * float(before.norm())


@pytest.mark.parametrize("method", ["drop-reap", "drop-naee", "merge-msmoe", "merge-ream"])
def test_a_refit_makes_up_for_what_a_drop_or_a_merge_loses(
    method: str, checkpoint: Checkpoint, statistics: Statistics, root: Path, tmp_path: Path
) -> None:
    """Every layer's output error is less after the re-fit, by a tenth at least."""
    result = prune(
        PruneRequest(
            model=checkpoint.path,
            output=tmp_path / "out",
            texts=TextOptions(paths=(root / "texts.jsonl",), tokens=1024, length=128),
            selection=Selection(keep=0.5, method=method, refit=True),
            statistics=statistics.folder,
        ),
        Silent(),
    )
    assert result.manifest.refit is not None
    for layer in result.manifest.refit.values():
        assert layer["error_after"] < 0.9 * layer["error_before"]


@pytest.mark.parametrize("method", ["merge-ream", "merge-cka"])
def test_a_router_of_groups_stays_sound(method: str, tmp_path: Path) -> None:
    """Four groups of two, ranked by their best two: each keeps both of its experts or none."""
    path = make_model(tmp_path / "model", "deepseek_v3")
    statistics = calibrated(path, tmp_path)
    plan = make_plan(
        open_checkpoint(path), statistics, Selection(keep=0.5, method=method), Silent()
    )
    for layer in plan.layers.values():
        selectable = [e for e in range(8) if layer.experts[e] is not None]
        assert all((e ^ 1) in selectable for e in selectable)
        assert len(layer.blocks) == 4
