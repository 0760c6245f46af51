"""Shared experts in the re-fit: what only they can make up for, and what stays byte for byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_serve.calibration.mixture import Mixture, Router, Shared, Unit
from moe_serve.calibration.states import States
from moe_serve.calibration.stream import Batch
from moe_serve.checkpoint.export import export
from moe_serve.checkpoint.manifest import Manifest
from moe_serve.checkpoint.quantisation.plain import Plain
from moe_serve.checkpoint.source import open_checkpoint
from moe_serve.families import Routing
from moe_serve.progress import Silent
from moe_serve.pruning.corpus import TextOptions
from moe_serve.pruning.fitting.refit import FitTokens, refit
from moe_serve.pruning.fitting.routed import Routed
from moe_serve.pruning.fitting.shared import undone_if_better, with_shared
from moe_serve.pruning.plan import Plan, Refit
from moe_serve.pruning.records.verify import verify
from moe_serve.pruning.request import PruneRequest
from moe_serve.pruning.run import prune
from moe_serve.pruning.selection import Selection
from tests.support.models import make_model, write_texts

TOKENS, HIDDEN, WIDTH = 200, 8, 6


def unit(owners: tuple[int, ...]) -> Unit:
    """Random neurons."""
    return Unit(
        owners=owners,
        gate_FD=torch.randn(WIDTH, HIDDEN),
        up_FD=torch.randn(WIDTH, HIDDEN),
        down_DF=torch.randn(HIDDEN, WIDTH),
    )


@pytest.mark.parametrize("gated", [False, True])
def test_a_loss_that_only_the_shared_expert_can_make_good(gated: bool, tmp_path: Path) -> None:
    """The target differs by 1.5 times the shared expert's own output, scaled by its gate.

    The routed neurons can't imitate it; with the shared expert among the units and hardly any λ,
    its down projection becomes 2.5 times what it was and nothing is left.
    """
    torch.manual_seed(0)
    shared = Shared(unit=unit(()), gate_1D=torch.randn(1, HIDDEN) if gated else None)
    mixture = Mixture(
        router=Router(weight_ND=torch.randn(2, HIDDEN), rule=Routing(top_k=1, renormalise=False)),
        units=(unit((0,)), unit((1,))),
        activation=torch.nn.functional.silu,
        shared=shared,
    )
    z = torch.randn(TOKENS, HIDDEN)
    batch = Batch(
        sequences=(0,), shape=(1, TOKENS), tokens=slice(0, TOKENS), device=torch.device("cpu")
    )
    tokens = FitTokens(
        batches=(batch,),
        omega_T=torch.ones(TOKENS),
        held_T=torch.zeros(TOKENS, dtype=torch.bool),
    )

    def fit(wanted: Mixture) -> tuple[Unit, float]:
        States(tmp_path / "z", HIDDEN).write(0, z)
        States(tmp_path / "e", HIDDEN).write(0, 1.5 * mixture.always(z))
        routed = Routed(wanted, States(tmp_path / "z", HIDDEN), (batch,))
        residual, settings = States(tmp_path / "e", HIDDEN), Refit(ridges=(1e-9,))
        fitted = refit(routed, residual, tokens, settings, Plain(dtype="F32"))
        return fitted.units[-1], fitted.error_after / fitted.error_before

    _, left = fit(mixture)
    assert left > 0.2
    found, left = fit(with_shared(mixture))
    assert left < 1e-6
    torch.testing.assert_close(found.down_DF, 2.5 * shared.unit.down_DF, rtol=1e-3, atol=1e-3)


def test_a_change_that_adds_error_is_undone(tmp_path: Path) -> None:
    """The residual left by a doubled down projection is minus the expert's output; undone: zero."""
    torch.manual_seed(0)
    mixture = Mixture(
        router=Router(weight_ND=torch.randn(2, HIDDEN), rule=Routing(top_k=1, renormalise=False)),
        units=(),
        activation=torch.nn.functional.silu,
        shared=Shared(unit=unit(()), gate_1D=torch.randn(1, HIDDEN)),
    )
    assert mixture.shared is not None
    own = mixture.shared.unit
    doubled = replace(
        mixture, shared=replace(mixture.shared, unit=replace(own, down_DF=2 * own.down_DF))
    )
    z = torch.randn(TOKENS, HIDDEN)
    batch = Batch(
        sequences=(0,), shape=(1, TOKENS), tokens=slice(0, TOKENS), device=torch.device("cpu")
    )
    tokens = FitTokens(
        batches=(batch,),
        omega_T=torch.ones(TOKENS),
        held_T=torch.zeros(TOKENS, dtype=torch.bool),
    )
    inputs, left = States(tmp_path / "z", HIDDEN), States(tmp_path / "e", HIDDEN)
    inputs.write(0, z)
    left.write(0, -mixture.always(z))
    assert undone_if_better(mixture, doubled, inputs, left, tokens)
    assert float(left.read(0, TOKENS).abs().max()) < 1e-4
    # The other way round the change is what takes the error away, and stays.
    assert not undone_if_better(doubled, mixture, inputs, left, tokens)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration texts."""
    return write_texts(tmp_path_factory.mktemp("texts") / "t.jsonl")


def request(model: Path, output: Path, texts: Path, **selection: object) -> PruneRequest:
    """A small run."""
    return PruneRequest(
        model=model,
        output=output,
        texts=TextOptions(paths=(texts,), tokens=1024, length=128),
        selection=Selection(**({"keep": 0.5} | selection)),  # type: ignore[arg-type]
        batch_tokens=512,
    )


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe", "glm4_moe"])
def test_error_falls_and_everything_else_keeps_its_bytes(
    family: str, texts: Path, tmp_path: Path
) -> None:
    """Less error in every layer than without; only down projections differ from the original."""
    model = make_model(tmp_path / "m", family, dtype=torch.bfloat16)
    with_it = request(model, tmp_path / "with", texts)
    prune(with_it, Silent())
    plan = Plan.load(tmp_path / "with/plan.json")
    assert plan.refit == Refit()
    plain = plan.model_copy(update={"refit": Refit(shared=False)})
    plain.save(tmp_path / "plan.json")
    prune(replace(with_it, output=tmp_path / "none", plan=tmp_path / "plan.json"), Silent())
    records = [Manifest.load(tmp_path / name).refit or {} for name in ("with", "none")]
    first = min(map(int, records[0]))  # Later layers see other inputs.
    assert records[0][str(first)]["error_after"] < records[1][str(first)]["error_after"]
    before, after, none = (
        load_file(path / "model.safetensors")
        for path in (model, tmp_path / "with", tmp_path / "none")
    )
    names = {
        names.down
        for layer in plan.layers
        if (names := open_checkpoint(model).family.shared_names(layer))
    }
    assert len(names) == len(plan.layers)
    changed = {n for n in before.keys() & after.keys() if not same(before[n], after[n])}
    assert {n for n in changed if ".experts." not in n} - set(bias(model, plan)) == names
    assert all(same(before[name], none[name]) for name in names)
    assert verify(tmp_path / "with", model, Silent()).problems == []
    assert verify(tmp_path / "none", model, Silent()).problems == []


def bias(model: Path, plan: Plan) -> list[str]:
    """Routers' correction biases, which silence experts."""
    family = open_checkpoint(model).family
    return [name for layer in plan.layers if (name := family.bias_name(layer))]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape and value."""
    return a.shape == b.shape and torch.equal(a, b)


def test_verify_notices_a_changed_gate(texts: Path, tmp_path: Path) -> None:
    """The re-fit explains a new down projection, nothing else of the shared expert."""
    model = make_model(tmp_path / "m", "qwen2_moe")
    prune(request(model, tmp_path / "out", texts), Silent())
    file = tmp_path / "out/model.safetensors"
    weights = load_file(file)
    layer = max(Plan.load(tmp_path / "out/plan.json").layers)
    names = open_checkpoint(model).family.shared_names(layer)
    assert names is not None
    weights[names.up][0, 0] += 1.0
    save_file(weights, file, metadata={"format": "pt"})
    problems = verify(tmp_path / "out", model, Silent()).problems
    assert f"tensor {names.up} differs from the original's" in problems


def test_keeping_everything_leaves_it_alone(texts: Path, tmp_path: Path) -> None:
    """With keep = 1 no layer changes, and neither does a shared expert."""
    model = make_model(tmp_path / "m", "qwen2_moe")
    prune(request(model, tmp_path / "out", texts, keep=1.0), Silent())
    before, after = (load_file(p / "model.safetensors") for p in (model, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(same(before[name], after[name]) for name in before)


def test_exports_carry_it(texts: Path, tmp_path: Path) -> None:
    """The full-size twin holds the re-fitted matrix."""
    model = make_model(tmp_path / "m", "qwen2_moe")
    prune(request(model, tmp_path / "out", texts), Silent())
    export(tmp_path / "out", tmp_path / "tied", "tied", Silent())
    compact, tied = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "tied"))
    for layer in Plan.load(tmp_path / "out/plan.json").layers:
        names = open_checkpoint(model).family.shared_names(layer)
        assert names is not None
        assert same(compact[names.down], tied[names.down])
