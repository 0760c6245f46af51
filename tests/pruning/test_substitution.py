"""Experts replaced by constants: what is written is what vLLM's format says, and reads back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from moe_serve.calibration.decoder import Decoder
from moe_serve.calibration.mixture import read_mixture
from moe_serve.calibration.store import Statistics
from moe_serve.checkpoint.export import export
from moe_serve.checkpoint.manifest import LayerCounts, Manifest
from moe_serve.checkpoint.source import Checkpoint, open_checkpoint
from moe_serve.errors import CheckpointError, IncompleteCheckpoint, PlanError, UsageError
from moe_serve.evaluation.inspection import inspect
from moe_serve.families import Shape
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions, load_corpus
from moe_serve.pruning.fitting.constants import ConstantSums
from moe_serve.pruning.methods.drops import constant_error
from moe_serve.pruning.methods.neurons import loss_root
from moe_serve.pruning.methods.view import Budget, LayerView
from moe_serve.pruning.plan import Plan
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.calibrated import calibrated
from tests.support.models import make_model
from tests.support.references import our_logits

CPU = torch.device("cpu")
STILL = 5
"""An expert of layer 0 that puts out nothing: zero stands for it exactly."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated model: 8 experts of 96 neurons, top 2, hidden size 64."""
    root = tmp_path_factory.mktemp("substitution")
    model = make_model(root / "m", "qwen3_moe", width=96, seed=3)
    weights = load_file(model / "model.safetensors")
    weights[f"model.layers.0.mlp.experts.{STILL}.down_proj.weight"].zero_()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    calibrated(model, root)
    return root


@pytest.fixture(scope="module")
def pruned(root: Path) -> Path:
    """Three of eight experts per layer on average are constants."""
    request = wish(root, root / "out", Selection(keep=0.65, constants=True))
    prune(request, Silent())
    return root / "out"


def wish(
    root: Path, output: Path, selection: Selection, form: str = "substitution"
) -> PruneRequest:
    """A run on the fixture."""
    return PruneRequest(
        model=root / "m",
        output=output,
        texts=TextOptions(paths=(root / "texts.jsonl",), tokens=1024, length=128),
        selection=selection,
        form=form,
        statistics=root / "statistics",
        batch_tokens=512,
    )


class PlainLoop(nn.Module):
    """One layer by the format's definition, token by token, from the files' tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor], layer: int, top_k: int) -> None:
        super().__init__()
        self.block = f"model.layers.{layer}.mlp"
        self.tensors = tensors
        self.top_k = top_k

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Σ w f(z), f a constant where the file holds one."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return torch.stack([self.token(z) for z in flat]).view_as(hidden)

    def token(self, z: torch.Tensor) -> torch.Tensor:
        """One token: weights are normalised over the selected, replaced or not."""
        scores = (self.tensors[f"{self.block}.gate.weight"].float() @ z).softmax(dim=0)
        top = scores.topk(self.top_k)
        total = torch.zeros_like(z)
        for weight, expert in zip(top.values / top.values.sum(), top.indices.tolist(), strict=True):
            total = total + weight * self.expert(expert, z)
        return total

    def expert(self, expert: int, z: torch.Tensor) -> torch.Tensor:
        """One expert's output."""
        prefix = f"{self.block}.experts.{expert}"
        if f"{prefix}.approx_value" in self.tensors:
            return self.tensors[f"{prefix}.approx_value"].float()
        gate, up, down = (
            self.tensors[f"{prefix}.{which}_proj.weight"].float()
            for which in ("gate", "up", "down")
        )
        return down @ (nn.functional.silu(gate @ z) * (up @ z))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def test_logits_are_those_of_a_plain_loop(root: Path, pruned: Path) -> None:
    """The original in transformers with each layer's experts by the definition above."""
    model = AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float32).eval()
    tensors = tensors_of(pruned)
    for index, layer in enumerate(model.model.layers):
        layer.mlp = PlainLoop(tensors, index, model.config.num_experts_per_tok)
    ids = torch.randint(1, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids).logits
    torch.testing.assert_close(our_logits(pruned, ids), expected, rtol=1e-4, atol=1e-4)


def test_files_hold_what_the_format_asks_for(root: Path, pruned: Path) -> None:
    """Stock architecture and count; ids kept; a constant for each replaced, and nothing else."""
    config = json.loads((pruned / "config.json").read_text())
    original = json.loads((root / "m" / "config.json").read_text())
    replaced = config.pop("approximate_experts")
    assert config == original
    names = {n for n in tensors_of(pruned) if ".experts." in n}
    expected = set()
    for layer in (0, 1):
        for expert in range(8):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            if expert in replaced.get(str(layer), []):
                expected.add(prefix + "approx_value")
            else:
                expected |= {prefix + f"{which}_proj.weight" for which in ("gate", "up", "down")}
    assert names == expected
    assert STILL in replaced["0"]  # Nothing is lost with it.


def test_bytes_with_constants_stay_within_the_budget(root: Path, pruned: Path) -> None:
    """0.65 · 16 = 10.4 experts, less what the constants take: 10 whole ones and 6 vectors."""
    before, after = (open_checkpoint(p).expert_bytes() for p in (root / "m", pruned))
    whole, vector = 3 * 96 * 64 * 4, 64 * 4
    assert sum(before.values()) == 16 * whole
    assert sum(after.values()) == 10 * whole + 6 * vector <= 0.65 * 16 * whole


def test_a_budget_that_constants_overstep_loses_an_expert() -> None:
    """6 of 8 experts and 2 vectors are more than 0.75: 5 stay. Over 40 layers 239 of 240."""
    shape = Shape(layers=2, hidden=64, experts=8, top_k=2, width=96, vocabulary=9)
    budget = Budget(keep=0.75, block_width=96, constants=True)
    assert budget.whole_experts(shape) == 5
    # 239 experts and 81 vectors of 1/288 each are 239.3; a 240th would make it 240.3.
    assert budget.whole_experts(shape, layers=40) == 239
    assert Budget(keep=0.75, block_width=96).whole_experts(shape) == 6
    assert Budget(keep=1.0, block_width=96, constants=True).whole_experts(shape) == 8


def test_saliency_is_the_error_of_the_best_constant(root: Path) -> None:
    """By brute force over the tokens that select an expert; nothing for one that is silent."""
    checkpoint = open_checkpoint(root / "m")
    statistics = calibrated_statistics(root)
    view = LayerView.of(checkpoint, statistics, 0)
    found = constant_error(view)
    assert float(found[STILL]) == 0.0
    root_DD = loss_root(view.gradients())
    mixture = view.mixture()
    z_TD, omega_T = inputs_of_layer_zero(root, checkpoint)
    weights_TN = mixture.router(z_TD)
    for expert, unit in enumerate(mixture.units):
        f_TD = mixture.hidden(unit, z_TD) @ unit.down_DF.T @ root_DD
        w_T1 = weights_TN[:, expert, None]
        rows, goal = (w_T1 * omega_T[:, None].sqrt()).double(), (w_T1 * f_TD).double()
        goal = goal * omega_T[:, None].sqrt().double()
        best = torch.linalg.lstsq(rows, goal).solution
        error = float((goal - rows @ best).square().sum() / omega_T.sum())
        assert float(found[expert]) == pytest.approx(error, rel=1e-3, abs=1e-9)


def calibrated_statistics(root: Path) -> Statistics:
    """What the fixture's calibration found."""
    return Statistics(root / "statistics")


def inputs_of_layer_zero(root: Path, checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """The first mixture's inputs on all calibration tokens [T, D], and weights [T]."""
    texts = TextOptions(paths=(root / "texts.jsonl",), tokens=1024, length=128)
    corpus = load_corpus(checkpoint, texts)
    assert corpus is not None
    decoder = Decoder(checkpoint, CPU)
    layer, embedding = decoder.layer(0), decoder.embedding()
    parts = []
    with torch.inference_mode():
        for tokens in corpus.sequences.tokens:
            x_BLD = embedding[torch.from_numpy(tokens)][None]
            z_BLD = layer.normed(layer.attend(x_BLD, decoder.rotary(1, len(tokens))))
            parts.append(z_BLD[0])
    return torch.cat(parts), corpus.sequences.weights()


def test_constants_minimise_the_routed_error(root: Path) -> None:
    """Least squares of w f on w, token by token."""
    checkpoint = open_checkpoint(root / "m")
    mixture = read_mixture(checkpoint, 0, CPU)
    z_TD = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    omega_T = torch.rand(200, generator=torch.Generator().manual_seed(2))
    sums = ConstantSums(mixture, (2, 6))
    for part in range(0, 200, 50):
        sums.observe(z_TD[part : part + 50], omega_T[part : part + 50])
    found_RD = sums.result(checkpoint.expert_scheme(0)[2])
    weights_TN = mixture.router(z_TD)
    for expert, value_D in zip((2, 6), found_RD, strict=True):
        f_TD = mixture.hidden(mixture.units[expert], z_TD) @ mixture.units[expert].down_DF.T
        w_T1 = weights_TN[:, expert, None] * omega_T[:, None].sqrt()
        best = torch.linalg.lstsq(w_T1, w_T1 * f_TD).solution[0]
        torch.testing.assert_close(value_D, best, rtol=1e-3, atol=1e-5)


def test_an_expert_no_token_selected_becomes_zero(root: Path) -> None:
    """Not NaN: vLLM takes that for a value the checkpoint has left out."""
    checkpoint = open_checkpoint(root / "m")
    sums = ConstantSums(read_mixture(checkpoint, 0, CPU), (1,))
    assert torch.equal(sums.result(checkpoint.expert_scheme(0)[2]), torch.zeros(1, 64))


def test_verify_holds_weights_against_the_original(root: Path, pruned: Path) -> None:
    """Hashes, structure, and gate and up projections byte for byte."""
    assert verify(pruned, root / "m", Silent()).problems == []
    counts = open_checkpoint(pruned).replaced
    assert {i: c.replaced for i, c in manifest_layers(pruned).items()} == {
        i: len(ids) for i, ids in counts.items()
    }
    found = inspect(pruned)
    assert found["replaced_by_constants"] == {str(i): list(ids) for i, ids in counts.items()}
    assert "0.33" in found["served_by"]
    assert found["compact"] == {}
    assert "approximate_experts" in (pruned / "README.md").read_text()


def manifest_layers(folder: Path) -> dict[int, LayerCounts]:
    """Counts per layer."""
    return Manifest.load(folder).layers


def test_refitted_constants_fit_better_than_fixed_ones(root: Path, tmp_path: Path) -> None:
    """The same experts go; what is left of the layers' outputs shrinks."""
    plain = Selection(keep=0.65, constants=True, refit=False)
    prune(wish(root, tmp_path / "fixed", plain), Silent())
    assert replaced_of(tmp_path / "fixed") == replaced_of(root / "out")
    for layer in json.loads((root / "out" / "moe_serve.json").read_text())["refit"].values():
        assert layer["error_after"] < layer["error_before"]


def replaced_of(folder: Path) -> dict[int, tuple[int, ...]]:
    """Which experts are constants."""
    return open_checkpoint(folder).replaced


def test_fewer_experts_than_the_router_selects_may_stay(root: Path, tmp_path: Path) -> None:
    """One of eight, though two are selected for each token."""
    prune(wish(root, tmp_path / "out", Selection(experts=1, constants=True)), Silent())
    assert {i: len(ids) for i, ids in replaced_of(tmp_path / "out").items()} == {0: 7, 1: 7}
    assert verify(tmp_path / "out", root / "m", Silent()).problems == []


def test_published_drops_leave_constants_too(root: Path, tmp_path: Path) -> None:
    """REAP's choice, as in the compact format; there the router never selects them."""
    chosen = Selection(experts=6, method="drop-reap", constants=True)
    prune(wish(root, tmp_path / "out", chosen), Silent())
    plain = Selection(experts=6, method="drop-reap")
    prune(wish(root, tmp_path / "compact", plain, form="compact"), Silent())
    table = open_checkpoint(tmp_path / "compact").table.layers
    assert replaced_of(tmp_path / "out") == {i: t.dropped for i, t in table.items()}


@pytest.mark.parametrize(
    ("selection", "form", "message"),
    [
        (Selection(keep=0.5, method="block-obs", constants=True), "substitution", "whole experts"),
        (Selection(keep=0.5, method="merge-cka", constants=True), "substitution", "whole experts"),
        (Selection(keep=0.5, method="drop-constant"), "compact", "give --format substitution"),
    ],
)
def test_what_the_format_has_no_room_for_is_refused(
    selection: Selection, form: str, message: str, root: Path, tmp_path: Path
) -> None:
    """Before anything is read."""
    with pytest.raises(UsageError, match=message):
        prune(wish(root, tmp_path / "out", selection, form), Silent())


def test_a_plan_with_constants_is_refused_elsewhere(
    root: Path, pruned: Path, tmp_path: Path
) -> None:
    """Without its constants it would be another model."""
    request = wish(root, tmp_path / "out", Selection(), form="compact")
    with pytest.raises(PlanError, match="replaces experts by constants"):
        prune(replace(request, plan=pruned / "plan.json"), Silent())


def test_a_silent_expert_of_a_compact_checkpoint_becomes_zero(root: Path, tmp_path: Path) -> None:
    """``[]`` contributes nothing, and that can be said in both formats; ``null`` can't."""
    made = Plan.load(root / "out" / "plan.json")
    quiet = {i: layer.model_copy(update={"constants": False}) for i, layer in made.layers.items()}
    made.model_copy(update={"layers": quiet, "refit": None}).save(tmp_path / "plan.json")
    request = wish(root, tmp_path / "compact", Selection(), form="compact")
    prune(replace(request, plan=tmp_path / "plan.json"), Silent())
    export(tmp_path / "compact", tmp_path / "out", "substitution", Silent())
    ids = torch.randint(1, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        our_logits(tmp_path / "out", ids), our_logits(tmp_path / "compact", ids)
    )
    dropped = Selection(experts=6, method="drop-reap")
    prune(wish(root, tmp_path / "null", dropped, form="compact"), Silent())
    with pytest.raises(PlanError, match="never selected"):
        export(tmp_path / "null", tmp_path / "no", "substitution", Silent())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1]], "not a mapping"),
        ({"9": [1]}, "no layer with experts"),
        ({"0": [1, 1]}, "must differ"),
        ({"0": [8]}, "lie below 8"),
        ({"0": ["1"]}, "not a list of expert ids"),
        ({"0": list(range(8))}, "at least one expert must stay"),
    ],
)
def test_a_damaged_list_is_named(value: object, message: str, root: Path, tmp_path: Path) -> None:
    """Each defect in words."""
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(edited(root / "m", tmp_path / "m", approximate_experts=value))


def test_the_other_declaration_is_refused(root: Path, tmp_path: Path) -> None:
    """Its constants have names of their own."""
    other = {"transform_config": {"expert_substitution": {"version": 1}}}
    with pytest.raises(CheckpointError, match="declare them as approximate_experts"):
        open_checkpoint(edited(root / "m", tmp_path / "m", compression_config=other))


def test_a_missing_constant_is_named(root: Path, tmp_path: Path) -> None:
    """The list says expert 3 of layer 1 is one; the files hold none."""
    with pytest.raises(IncompleteCheckpoint, match=r"layers\.1\.mlp\.experts\.3\.approx_value"):
        open_checkpoint(edited(root / "m", tmp_path / "m", approximate_experts={"1": [3]}))


def test_it_is_not_pruned_again(root: Path, pruned: Path, tmp_path: Path) -> None:
    """Its statistics would be those of constants."""
    request = wish(root, tmp_path / "out", Selection(keep=0.5))
    with pytest.raises(UsageError, match="prune the original instead"):
        prune(replace(request, model=pruned), Silent())


def edited(model: Path, target: Path, **changes: object) -> Path:
    """The same files under a changed config."""
    target.mkdir()
    config = json.loads((model / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").symlink_to(model / "model.safetensors")
    return target
