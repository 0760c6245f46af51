"""``auto``: what was weighed, layer by layer, and that the best of it is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.checkpoint.staging import Staging
from moe_serve.families import Shape
from moe_serve.progress import Silent
from moe_serve.pruning import trial
from moe_serve.pruning.auto import LEADERS, RIVALS, rivals
from moe_serve.pruning.corpus import TextOptions, load_corpus
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.planner import make_plan
from moe_serve.pruning.selection import Selection
from moe_serve.pruning.trial import Trial
from tests.support.calibrated import calibrated
from tests.support.models import make_model


def trial_at(root: Path, staging: Staging | None = None) -> Trial:
    """What plans are measured with."""
    checkpoint = open_checkpoint(root / "m")
    texts = TextOptions(paths=(root / "texts.jsonl",), tokens=1024, length=128)
    corpus = load_corpus(checkpoint, texts)
    assert corpus is not None
    return Trial(
        checkpoint=checkpoint,
        sequences=corpus.sequences,
        folder=staging.work if staging else root,
        staging=staging,
        device=torch.device("cpu"),
        batch_tokens=512,
    )


def planned(root: Path, staging: Staging | None = None, **selection: object) -> Plan:
    """A plan by ``auto`` at half the bytes."""
    wanted = Selection(keep=0.5, **selection)  # type: ignore[arg-type]
    trial = trial_at(root, staging)
    statistics = Statistics(root / "statistics")
    return make_plan(trial.checkpoint, statistics, wanted, Silent(), trial=trial)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, calibrated."""
    root = tmp_path_factory.mktemp("plain")
    calibrated(make_model(root / "m", "qwen3_moe", width=96, seed=3), root)
    return root


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts 4 to 7 are copies of 0 to 3, their router rows nearly so."""
    root = tmp_path_factory.mktemp("twins")
    model = make_model(root / "m", "qwen3_moe", width=96, seed=3)
    weights = load_file(model / "model.safetensors")
    for layer in (0, 1):
        mlp = f"model.layers.{layer}.mlp"
        gate = weights[f"{mlp}.gate.weight"]
        gate[4:] = gate[:4] * 1.001
        for expert in range(4):
            for name in ("gate_proj", "up_proj", "down_proj"):
                source = weights[f"{mlp}.experts.{expert}.{name}.weight"]
                weights[f"{mlp}.experts.{expert + 4}.{name}.weight"] = source.clone()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    calibrated(model, root)
    return root


def test_every_option_is_in_the_plan_with_its_figure(plain: Path) -> None:
    """Both leaders on the whole model, all methods in each layer, the least error taken."""
    plan = planned(plain)
    weighed = plan.settings["weighed"]
    assert set(LEADERS) <= set(weighed["whole_model"])
    best = min(LEADERS, key=lambda name: weighed["whole_model"][name]["mean"])
    for layer in weighed["layers"].values():
        before, after = layer["uncompensated"], layer["error"]
        assert {best, *RIVALS} <= set(before)
        assert set(before) - set(after) == {n for n in before if before[n] > 2 * before[best]}
        assert layer["taken"] == min(layer["error"], key=layer["error"].__getitem__)
    assert plan.method in ("auto", best)
    checkpoint = open_checkpoint(plain / "m")
    everything = 2 * checkpoint.shape.experts * checkpoint.shape.width
    assert sum(layer.neurons_kept() for layer in plan.layers.values()) <= everything // 2


@pytest.mark.parametrize("name", ["plain", "twins"])
def test_the_hopeless_would_not_have_been_taken(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all are compensated, the same plan is made; some had been spared that."""
    root = request.getfixturevalue(name)
    found = planned(root)
    monkeypatch.setattr(trial, "_HOPELESS", float("inf"))
    patient = planned(root)
    assert found.layers == patient.layers
    spared = [
        len(patient.settings["weighed"]["layers"][index]["error"]) - len(layer["error"])
        for index, layer in found.settings["weighed"]["layers"].items()
    ]
    assert sum(spared) > 0


def test_figures_are_those_of_a_walk_with_the_plan_alone(plain: Path) -> None:
    """Whatever was attempted in between: the walk that weighs goes on from what it took."""
    plan = planned(plain)
    name = plan.method if plan.method in LEADERS else "mixture"
    said = plan.settings["weighed"]["whole_model"][name]
    assert plan.refit is not None
    assert trial_at(plain).measure("again", plan.layers, plan.refit)._asdict() == said


class Dying(Staging):
    """A journal whose process dies before a step is recorded: its files are there."""

    def __init__(self, path: Path, lives: int) -> None:
        """Record so many steps."""
        super().__init__(path, {})
        self._lives = lives

    def finish(self, step: str, record: object = True) -> None:
        """Record, or die."""
        if not self._lives:
            raise KeyboardInterrupt
        self._lives -= 1
        super().finish(step, record)


@pytest.mark.parametrize("name", ["plain", "twins"])
def test_killed_before_any_step_it_goes_on_to_the_same_plan(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Two layers and an outcome for each of two or three walks: no step is taken again."""
    root = request.getfixturevalue(name)
    whole = planned(root).sha256()
    for lives in range(1, 4):
        place = tmp_path / f"{lives}"
        deaths = 0
        while True:
            try:
                found = planned(root, Dying(place, lives))
            except KeyboardInterrupt:
                deaths += 1
            else:
                break
        assert found.sha256() == whole
        assert deaths == ((6 if name == "plain" else 9) - 1) // lives
        assert list((place / "work").glob("trial-*")) == [place / "work/trial-states"]


def test_duplicates_are_merged_where_neurons_would_lose(twins: Path) -> None:
    """Half the experts are copies: merging pairs loses nothing, half the neurons lose much."""
    plan = planned(twins, across_layers=False)
    weighed = plan.settings["weighed"]
    assert plan.method == "auto"
    for layer in weighed["layers"].values():
        assert layer["taken"] == "merge-cka"
        assert layer["error"]["merge-cka"] < 1e-3 * layer["error"]["block-obs"]
    whole = weighed["whole_model"]
    assert whole["mixture"]["mean"] < 0.01 * min(whole[name]["mean"] for name in LEADERS)
    for layer in plan.layers.values():
        for expert in range(4):
            assert layer.experts[expert] == layer.experts[expert + 4]


def test_without_tokens_to_measure_on_neurons_are_chosen(plain: Path) -> None:
    """From statistics alone the method that won everywhere it was measured."""
    checkpoint = open_checkpoint(plain / "m")
    plan = make_plan(checkpoint, Statistics(plain / "statistics"), Selection(keep=0.5), Silent())
    assert plan.method == "block-obs"
    assert "weighed" not in plan.settings


def test_wide_experts_are_not_aligned() -> None:
    """Mixtral's 14,336 neurons: no merges among the rivals, drops stay."""
    wide = Shape(layers=1, hidden=8, experts=8, top_k=2, width=14336, vocabulary=9)
    assert set(RIVALS) - set(rivals(wide)) == {"merge-msmoe", "merge-cka"}
